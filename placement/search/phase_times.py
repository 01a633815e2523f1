"""Step times of one worker in the three profile forms, as the bounds need them."""

from dataclasses import dataclass

import numpy as np

from placement.search.designs import Worker
from placement.simulation.timing import (
    DistserveTiming,
    SplitwiseTiming,
    StepTiming,
    at_sizes,
    interpolate,
)
from placement.simulation.trace import Floats, Ints
from placement.simulation.values import Rules

SPLITWISE_STEP_TOKENS = 2048
UNBOUNDED_BATCH = 512
ENGINE_MS, ENGINE_MS_PER_TOKEN = 2.0, 0.0001  # rules distserve, on the first stage


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """Seconds: of prompts alone in a worker, of the worker's time they take, of decode steps."""

    latency_s: Floats  # per prompt of the sample: from start to first token
    occupied_s: Floats  # per prompt: until the worker can take the next one
    saturated_s: float  # per prompt of mean length, in the largest batches that a promise allows
    batches: Ints
    step_s: Floats  # per batch of `batches`: one token of each request, at the mean context
    floor_step_s: float  # one request alone


def phase_times(
    worker: Worker,
    rules: Rules,
    sample: tuple[Ints, Ints],
    *,
    max_step_tokens: int,
    max_batch: int,
    ttft_s: float,
) -> PhaseTimes:
    """Reduce a worker's timing to what bounds and estimates read."""
    prompts, outputs = sample
    context = float(np.average(prompts + outputs / 2, weights=np.maximum(outputs, 1)))
    held = float(np.average(prompts + outputs, weights=np.maximum(outputs, 1)))
    timing = worker.pool.timing
    if rules is Rules.DISTSERVE:
        assert isinstance(timing, DistserveTiming)
        return _distserve(timing, worker.pp, prompts, context, ttft_s)
    if rules is Rules.SPLITWISE:
        assert isinstance(timing, SplitwiseTiming)
        return _splitwise(timing, prompts, context, ttft_s)
    steps = timing.to_steps(max_batch)
    room = worker.pool.kv_tokens
    most = min(max_batch, int(room / held) if room else max_batch)
    return _steps(steps, worker.pp, prompts, context, max_step_tokens, max(most, 1))


def _batch_axis(most: int) -> Ints:
    return np.unique(np.rint(np.geomspace(1, max(most, 1), 48)).astype(np.int64))


def _distserve(
    timing: DistserveTiming, pp: int, prompts: Ints, context: float, ttft_s: float
) -> PhaseTimes:
    a, b, c = timing.prefill
    lengths = prompts.astype(float)
    stage = ((a + b * lengths + c * lengths**2) / pp + pp) / 1e3
    engine = (ENGINE_MS + ENGINE_MS_PER_TOKEN * lengths) / 1e3
    mean = float(lengths.mean())
    square = float((lengths**2).mean())
    sizes = np.arange(1, 65)
    stages = ((a + sizes * (b * mean + c * square)) / pp + pp) / 1e3
    engines = (ENGINE_MS + ENGINE_MS_PER_TOKEN * sizes * mean) / 1e3
    allowed = (stages * pp + engines <= ttft_s) & (sizes * mean <= timing.max_num_tokens)
    allowed[0] = True
    saturated = float(((stages + engines) / sizes)[allowed].min())
    batches = _batch_axis(UNBOUNDED_BATCH)
    fit = timing.decode_fit(batches)
    step = (fit[:, 0] + fit[:, 1] * batches * (context + 1) + fit[:, 2] * batches) / 1e3
    step = step + (ENGINE_MS + ENGINE_MS_PER_TOKEN * batches * context) / 1e3
    return PhaseTimes(
        latency_s=stage * pp + engine,
        occupied_s=stage + engine,
        saturated_s=saturated,
        batches=batches * pp,
        step_s=step,
        floor_step_s=float(step[0]),
    )


def _splitwise(timing: SplitwiseTiming, prompts: Ints, context: float, ttft_s: float) -> PhaseTimes:
    one = interpolate(timing.tokens, timing.prompt_s, prompts)
    mean = float(prompts.mean())
    sizes = np.arange(1, max(int(SPLITWISE_STEP_TOKENS / mean), 1) + 1)
    per = interpolate(timing.tokens, timing.prompt_s, sizes * mean) / sizes
    saturated = min(float(per.min()), float(one.mean()))
    room = (timing.memory_bytes - timing.weight_bytes) / timing.kv_bytes_per_token
    batches = _batch_axis(min(UNBOUNDED_BATCH, int(room / max(context, 1.0))))
    step = interpolate(timing.tokens, timing.token_s, batches)
    return PhaseTimes(
        latency_s=one,
        occupied_s=one,
        saturated_s=saturated,
        batches=batches,
        step_s=step,
        floor_step_s=float(step[0]),
    )


def _steps(
    timing: StepTiming, pp: int, prompts: Ints, context: float, budget: int, most: int
) -> PhaseTimes:
    lengths = prompts.astype(float)
    full, rest = np.divmod(lengths, budget)
    knots, values = timing.prefill_tokens, timing.prefill_s
    whole = interpolate(knots, values, budget)
    parts = np.where(rest > 0, interpolate(knots, values, rest), 0.0)
    # The rate per pair is that of the step's own tokens.
    pair_s = np.interp(np.minimum(lengths, budget), knots, timing.pair_s)
    attention = lengths * (lengths + 1) / 2 * pair_s
    latency = full * whole + parts + attention
    packed = float(np.mean(lengths * (whole / budget) + attention))
    batches = _batch_axis(most)
    size = -(-batches // pp)
    step = at_sizes(timing.decode_s, size) + at_sizes(timing.context_s, size) * size * context
    return PhaseTimes(
        latency_s=latency,
        occupied_s=latency / pp,
        saturated_s=min(packed, float(latency.mean())) / pp,
        batches=batches,
        step_s=step,
        floor_step_s=float(step[0]),
    )
