"""What others must know of an engine."""

from dataclasses import dataclass

from pdserve.domain.layout import KvLayout


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
