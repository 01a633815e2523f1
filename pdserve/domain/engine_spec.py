"""What others must know of an engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.domain.layout import KvLayout, ShardedLayout
from pdserve.domain.lengths import ONE_REGIME, LengthRule
from pdserve.domain.prefix import hash_full_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What others must know of an engine. Hashes are 16 bytes."""

    kind: str  # torch | timed
    model_name: str
    model_hash: bytes
    tokenizer_hash: bytes
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    layout: KvLayout
    length_rule: LengthRule = ONE_REGIME

    @property
    def sharded_layout(self) -> ShardedLayout:
        """Of one rank: every engine has the KV of all that it stands for in one memory."""
        return ShardedLayout(whole=self.layout)

    def block_names(self, prompt: Sequence[int]) -> tuple[bytes, ...]:
        """Names of the prompt's full blocks, alike at all workers that are paired."""
        salt = self.model_hash + self.length_rule.salt(len(prompt))
        return hash_full_blocks(prompt, self.layout.block_size, salt)
