"""How long an engine step takes: the one formula that router, solver and timed engine share.

A step is linear in what it holds. The form is that of DistServe (OSDI'24, appendix A): compute
over prompt tokens, attention over (token, earlier token) pairs, and for decode the bytes of
weights (fixed) and of KV (context). `placement.latency` says where coefficients come from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.domain.pair_cost import reading_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What one step computes; counts in tokens, attention in (token, attended token) pairs."""

    num_prefill_tokens: int = 0
    num_prefill_pairs: int = 0
    num_decodes: int = 0
    num_decode_context_tokens: int = 0

    @classmethod
    def of(
        cls, prefill_chunks: Iterable[tuple[int, int]] = (), decode_contexts: Iterable[int] = ()
    ) -> "StepShape":
        """Build from (first position, length) of each prefill chunk and each decode's context."""
        chunks, contexts = list(prefill_chunks), list(decode_contexts)
        return cls(
            num_prefill_tokens=sum(length for _, length in chunks),
            num_prefill_pairs=sum(num_attention_pairs(start, length) for start, length in chunks),
            num_decodes=len(contexts),
            num_decode_context_tokens=sum(contexts),
        )

    @classmethod
    def total(cls, shapes: Sequence["StepShape"]) -> "StepShape":
        """Of several steps together."""
        return cls(
            num_prefill_tokens=sum(each.num_prefill_tokens for each in shapes),
            num_prefill_pairs=sum(each.num_prefill_pairs for each in shapes),
            num_decodes=sum(each.num_decodes for each in shapes),
            num_decode_context_tokens=sum(each.num_decode_context_tokens for each in shapes),
        )


def num_attention_pairs(start: int, length: int) -> int:
    """Pairs that causal attention computes for `length` tokens after `start` earlier ones."""
    return length * start + length * (length + 1) // 2


class StepLatency(Protocol):
    """Anything that can time a step."""

    def step_s(self, shape: StepShape) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCoefficients:
    """The linear model; seconds. `relative_error` is the spread of measured / predicted - 1."""

    fixed_s: float
    prefill_token_s: float
    prefill_attention_s: float
    decode_token_s: float
    decode_context_token_s: float
    relative_error: float = 0.0

    def step_s(self, shape: StepShape) -> float:
        return (
            self.fixed_s
            + self.prefill_token_s * shape.num_prefill_tokens
            + self.prefill_attention_s * shape.num_prefill_pairs
            + self.decode_token_s * shape.num_decodes
            + self.decode_context_token_s * shape.num_decode_context_tokens
        )

    def steps_s(self, num_steps: int, shape: StepShape) -> float:
        """Time of so many steps that hold `shape` together."""
        return self.step_s(shape) + (num_steps - 1) * self.fixed_s

    def prefill_s(self, start: int, length: int, chunk_tokens: int) -> float:
        """Time to read `length` tokens after `start` cached ones, alone, in chunks."""
        return reading_s(
            self.fixed_s,
            self.prefill_token_s,
            self.prefill_attention_s,
            chunk_tokens,
            1,
            length,
            num_attention_pairs(start, length),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSteps:
    """The last steps of one kind that a worker took, summed up."""

    num_steps: int
    shape: StepShape  # what they held together
    elapsed_s: float  # what they take together when nothing pauses them
    relative_error: float  # of `elapsed_s`, as a standard deviation
    age_s: float  # since the last of them ended

    def slowness(self, coefficients: StepCoefficients) -> float | None:
        """Measured over predicted time; None if `coefficients` make such steps free."""
        predicted_s = coefficients.steps_s(self.num_steps, self.shape)
        return self.elapsed_s / predicted_s if predicted_s > 0 else None
