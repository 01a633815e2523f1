"""How long a step of one instance takes, in the three forms that the kernels read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.domain.latency import StepCoefficients, StepLatency, StepShape

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Triple = tuple[float, float, float]

PREFILL_KNOTS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens in a step at which a general latency model is sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """Seconds of a step, general form, the one that rules pdserve read.

        prefill   prefill_s(tokens) + pairs * pair_s(tokens)
        decode    decode_s[B] + context_s[B] * context tokens, by requests B
        mixed     prefill + decode - shared_s: what a step costs in any case is paid once

    `pairs` as in `pdserve.domain.latency`. Curves are straight between knots; the end segments go
    on, as do the last segments of the tables over B.
    """

    prefill_tokens: Floats  # knots
    prefill_s: Floats
    pair_s: Floats
    decode_s: Floats  # [B]; entry 0 is not used
    context_s: Floats
    shared_s: float = 0.0
    source: str = ""  # where the numbers come from, for people

    def to_steps(self, max_num_requests: int) -> "StepTiming":
        """Itself: the other forms are turned into this one."""
        return self

    @classmethod
    def of_coefficients(cls, c: StepCoefficients, *, source: str = "") -> "StepTiming":
        """The linear model of `pdserve.domain.latency`, exactly."""
        knots = np.array([0.0, 1.0])
        return cls(
            prefill_tokens=knots,
            prefill_s=c.fixed_s + c.prefill_token_s * knots,
            pair_s=np.full(2, c.prefill_attention_s),
            decode_s=c.fixed_s + c.decode_token_s * knots,
            context_s=np.full(2, c.decode_context_token_s),
            shared_s=c.fixed_s,
            source=source,
        )

    @classmethod
    def of_model(
        cls,
        model: StepLatency,
        *,
        max_num_requests: int,
        prompt_tokens: int = 2048,
        context_tokens: int = 1024,
        source: str = "",
    ) -> "StepTiming":
        """Sample any latency model around the workload's mean prompt and decode context.

        Attention is sampled at prompts of `prompt_tokens` or a step's own length if that is more,
        decode at half and twice `context_tokens` for each request.
        """
        knots = np.array(PREFILL_KNOTS, float)
        prefill_s, pair_s = np.zeros(len(knots)), np.zeros(len(knots))
        for index, tokens in enumerate(PREFILL_KNOTS):
            pairs = tokens * (max(tokens, prompt_tokens) + 1) // 2
            least = StepShape(num_prefill_tokens=tokens, num_prefill_pairs=tokens)
            whole = StepShape(num_prefill_tokens=tokens, num_prefill_pairs=pairs)
            pair_s[index] = (model.step_s(whole) - model.step_s(least)) / (pairs - tokens)
            prefill_s[index] = model.step_s(whole) - pair_s[index] * pairs
        num_sizes = max(max_num_requests, 2)  # two, so that the table has a segment to go on
        decode_s, context_s = np.zeros(num_sizes + 1), np.zeros(num_sizes + 1)
        for size in range(1, num_sizes + 1):
            low, high = size * max(context_tokens // 2, 1), size * 2 * context_tokens
            low_s = model.step_s(StepShape(num_decodes=size, num_decode_context_tokens=low))
            high_s = model.step_s(StepShape(num_decodes=size, num_decode_context_tokens=high))
            context_s[size] = (high_s - low_s) / (high - low)
            decode_s[size] = low_s - context_s[size] * low
        return cls(
            prefill_tokens=knots,
            prefill_s=prefill_s,
            pair_s=pair_s,
            decode_s=decode_s,
            context_s=context_s,
            shared_s=float(min(prefill_s[0], decode_s[1])),
            source=source,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistserveTiming:
    """DistServe's fit, in ms; see `placement/data/distserve/SOURCE.md` for the formula."""

    prefill: Triple
    decode_small: Triple
    decode_large: Triple
    threshold: int  # requests from which `decode_large` holds
    max_num_tokens: int  # KV capacity at this parallelism, and the prefill budget

    def decode_fit(self, sizes: Ints) -> Floats:
        """The coefficients that hold for batches of these sizes: [sizes, 3]."""
        small, large = np.array(self.decode_small), np.array(self.decode_large)
        return np.where(sizes[:, None] < self.threshold, small, large)

    def to_steps(self, max_num_requests: int) -> StepTiming:
        """The same in the general form: tokens and pairs instead of squares."""
        a, b, c = self.prefill
        knots = np.array([0.0, 1.0])
        size = np.arange(max_num_requests + 1)
        fit = self.decode_fit(size) / 1e3
        # L**2 = 2 * pairs - L for a prompt read in one piece.
        return StepTiming(
            prefill_tokens=knots,
            prefill_s=(a + (b - c) * knots) / 1e3,
            pair_s=np.full(2, 2 * c / 1e3),
            decode_s=fit[:, 0] + (fit[:, 1] + fit[:, 2]) * size,
            context_s=fit[:, 1].copy(),
            shared_s=min(a, self.decode_small[0]) / 1e3,
            source="DistServe's fit",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitwiseTiming:
    """Medians of Splitwise's measurements over batch tokens, in s, and the machine's memory."""

    tokens: Floats
    prompt_s: Floats
    token_s: Floats
    memory_bytes: float  # of all GPUs of one instance
    weight_bytes: float
    kv_bytes_per_token: float

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits into one instance beside the weights."""
        return int((self.memory_bytes - self.weight_bytes) // self.kv_bytes_per_token)

    def to_steps(self, max_num_requests: int) -> StepTiming:
        """The same in the general form; decode does not depend on the context in this data."""
        size = np.arange(max_num_requests + 1, dtype=float)
        decode_s = interpolate(self.tokens, self.token_s, size)
        return StepTiming(
            prefill_tokens=self.tokens,
            prefill_s=self.prompt_s,
            pair_s=np.zeros(len(self.tokens)),
            decode_s=decode_s,
            context_s=np.zeros(max_num_requests + 1),
            shared_s=float(min(self.prompt_s[0], decode_s[1])) if max_num_requests else 0.0,
            source="Splitwise's measurements",
        )


def interpolate(knots: Floats, values: Floats, at: NDArray[Any] | float) -> Floats:
    """Straight lines between knots; the end segments go on outside."""
    left = np.clip(np.searchsorted(knots, at) - 1, 0, len(knots) - 2)
    slope = (values[left + 1] - values[left]) / (knots[left + 1] - knots[left])
    line: Floats = slope * (at - knots[left]) + values[left]
    return line


def at_sizes(table: Floats, sizes: Ints) -> Floats:
    """Entries of a table by batch size; beyond its end it goes on along its last segment."""
    last = len(table) - 1
    beyond = np.maximum(sizes - last, 0)
    found: Floats = table[np.minimum(sizes, last)] + beyond * (table[last] - table[last - 1])
    return found
