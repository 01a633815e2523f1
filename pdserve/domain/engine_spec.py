"""What others must know of an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

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
    layout: KvLayout  # of the whole model
    length_rule: LengthRule = ONE_REGIME
    tp: int = 1  # ranks that divide a stage's KV; 1 too for an engine that stands for them all
    pp: int = 1  # stages that divide the layers

    @property
    def sharded_layout(self) -> ShardedLayout:
        """How the KV is divided among the memories of this engine."""
        return ShardedLayout(whole=self.layout, tp=self.tp, pp=self.pp)

    def block_names(self, prompt: Sequence[int]) -> tuple[bytes, ...]:
        """Names of the prompt's full blocks, alike at all workers that are paired."""
        salt = self.model_hash + self.length_rule.salt(len(prompt))
        return hash_full_blocks(prompt, self.layout.block_size, salt)


class StepPath(StrEnum):
    """How a step's operators are launched."""

    EAGER = "eager"  # one by one
    GRAPH = "graph"  # as one that was recorded
