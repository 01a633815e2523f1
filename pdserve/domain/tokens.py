"""Output tokens and the way an answer ends."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pdserve.domain.errors import PdserveError, Reason

SLICE_TOKENS = 16_384
"""Token ids that are handled at a time: about a millisecond."""


def slices(token_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """A prompt of any length in pieces, between which other work can have its turn."""
    for first in range(0, len(token_ids), SLICE_TOKENS):
        yield token_ids[first : first + SLICE_TOKENS]


def are_below(token_ids: Sequence[int], vocab_size: int) -> bool:
    """True if every id is in the vocabulary; ids are not negative."""
    return all(max(part) < vocab_size for part in slices(token_ids))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One output token; log-probabilities are natural, of the untempered distribution."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()

    @property
    def is_finite(self) -> bool:
        """No log-probability is NaN or infinite."""
        values = [value for _, value in self.top_logprobs]
        return all(map(math.isfinite, values)) and math.isfinite(self.logprob or 0.0)


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimeline:
    """Where the time of one request went; seconds. See `PhaseTimeline` in types.proto."""

    router_queue_s: float = 0.0
    reserve_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    handoff_wait_s: float = 0.0
    decode_queue_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    attempts: int = 1
    transferred_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What is counted; `seed`, sent again with the same request, gives the same tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The good end of an answer, as its client gets it."""

    reason: FinishReason
    usage: Usage
    timeline: PhaseTimeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A request ended with its whole answer."""

    reason: FinishReason
    cached_prompt_tokens: int
    timeline: PhaseTimeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A request, or a handoff, ended without its result."""

    reason: Reason
    message: str
    retry_after_s: float = 0.0

    @classmethod
    def of(cls, error: PdserveError) -> "Failed":
        return cls(reason=error.reason, message=error.message, retry_after_s=error.retry_after_s)
