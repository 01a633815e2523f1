"""What a worker asks of an engine, and what it gets back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.domain.engine_spec import EngineSpec, StepPath
from pdserve.domain.ids import BlockId
from pdserve.domain.latency import StepShape
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.kv_store import KvStore
from pdserve.engine.ranks.ranked_kv import RankedKv


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """One request's share of a step: compute `token_ids` at positions `start`, `start + 1`, ...

    `block_table` covers positions 0 to `start + len(token_ids)` in logical order; KV of all
    positions before `start` is already in it. With `sample`, the token after the last of
    `token_ids` is drawn. A decode step is a chunk of one token with a `sample` of index above 0.

    `num_tokens` is how many the request has in all: a chunk of a long prompt is computed as the
    whole prompt would be, and not as a short one (see `LengthRule`).

    A sequence that `follows` computes one token that is drawn by the step before, which may still
    be under way: that of place `follows` among all that it draws. What stands in `token_ids` is not
    looked at. Only engines that look ahead take it, and only if `is_drawn_on_device` is true of all
    draws of the step before. If that step fails, what this one gives means nothing; if one of its
    draws fails, what the sequence that follows it gives means nothing.
    """

    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[BlockId, ...]
    sample: "SampleStep | None" = None
    num_tokens: int = 0  # left out: they end with this chunk
    follows: int | None = None

    @property
    def length(self) -> int:
        return max(self.num_tokens, self.start + len(self.token_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStep:
    """Draw output token number `token_index` (from 0); the draw is keyed by (seed, index).

    While `token_index < min_tokens`, the model's end tokens and `stop_token_ids` are masked.
    """

    params: SamplingParams
    token_index: int

    @property
    def is_drawn_on_device(self) -> bool:
        """Engines on a device leave rare draws to the host: logprobs, and tokens ruled out."""
        return self.params.logprobs is None and self.token_index >= self.params.min_tokens


OnLayers = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """`on_layers`, if the engine can tell, hears how many layers have their final KV of this batch.

    It is called from any thread, each time with more of the layers of the engine's own KV.
    """

    sequences: tuple[SequenceStep, ...]
    on_layers: OnLayers | None = field(default=None, compare=False)

    def shape(self) -> StepShape:
        """A one-token chunk that draws an answer's second or later token counts as decode.

        All else is prefill, a prompt's last token on its own too: so the planner counts it.
        """
        chunks, contexts = [], []
        for sequence in self.sequences:
            sample = sequence.sample
            if len(sequence.token_ids) == 1 and sample is not None and sample.token_index > 0:
                contexts.append(sequence.start + 1)
            else:
                chunks.append((sequence.start, len(sequence.token_ids)))
        return StepShape.of(chunks, contexts)


Drawn = SampledToken | Failed
"""A token, or why there is none: such a row ends its request, and no other one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest steps that an engine will be given, for which it makes room."""

    max_num_requests: int = 64
    max_num_tokens: int = 512  # of prompts


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry for each sequence of the batch, None if nothing was to be sampled."""

    sampled: tuple[Drawn | None, ...]
    elapsed_s: float
    path: StepPath = StepPath.EAGER

    @property
    def num_tokens(self) -> int:
        """How many tokens were drawn."""
        return sum(isinstance(drawn, SampledToken) for drawn in self.sampled)

    @property
    def is_lost(self) -> bool:
        """No sequence was computed."""
        return all(isinstance(drawn, Failed) for drawn in self.sampled)


class Engine(Protocol):
    """Owns weights and KV memory. One step at a time; the caller owns the block tables.

    An engine that looks ahead takes a second step while one is under way, and computes it after
    that: its sequences may follow draws of the first one.
    """

    spec: EngineSpec

    @property
    def looks_ahead(self) -> bool: ...

    @property
    def kv(self) -> KvStore | RankedKv: ...

    async def step(self, batch: StepBatch) -> StepResult:
        """Run the batch without blocking the event loop.

        A cancelled call still finishes its computation before the engine takes the next one, so
        that blocks are never written after their owner freed them and the call returned.
        """
        ...

    def close(self) -> None: ...
