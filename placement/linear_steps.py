"""Step times of a simulated worker as the one linear formula of `pdserve.domain.latency`, for
engines and routers that take nothing else."""

import numpy as np

from pdserve.domain.latency import StepCoefficients
from placement.simulation.trace import Floats
from placement.simulation.values import Pool, PoolRole

NUM_SAMPLES = 33


def linear_steps(pool: Pool, *, max_step_tokens: int, max_num_requests: int) -> StepCoefficients:
    """The straight lines closest to `pool`'s curves over steps that its limits allow.

    The time of every step counts alike, not in relation to itself, and the fixed part is that of
    the role's own phase. Exact where the curves are lines; `relative_error` is the root mean square
    of line / curve - 1. With several stages the time is that of the whole pipeline, as the curves'.
    """
    steps = pool.timing.to_steps(max_num_requests)
    tokens = np.linspace(1, max(max_step_tokens, 2), NUM_SAMPLES)
    read_s = _curve(tokens, steps.prefill_tokens, steps.prefill_s)
    sizes = np.linspace(1, max(max_num_requests, 2), NUM_SAMPLES)
    write_s = _curve(sizes, _sizes(steps.decode_s), steps.decode_s)
    fixed_read_s, token_s = _line(tokens, read_s)
    fixed_write_s, decode_token_s = _line(sizes, write_s)
    pair_s = _curve(tokens, steps.prefill_tokens, steps.pair_s)
    context_s = _curve(sizes, _sizes(steps.context_s), steps.context_s)
    is_reader = pool.role is PoolRole.PREFILL
    errors = (
        (fixed_read_s + token_s * tokens) / read_s - 1
        if is_reader
        else (fixed_write_s + decode_token_s * sizes) / write_s - 1
    )
    return StepCoefficients(
        fixed_s=(fixed_read_s if is_reader else fixed_write_s),
        prefill_token_s=token_s,
        prefill_attention_s=float(pair_s.mean()),
        decode_token_s=decode_token_s,
        decode_context_token_s=float(context_s.mean()),
        relative_error=float(np.sqrt(np.mean(errors**2))),
    )


def _sizes(table: Floats) -> Floats:
    return np.arange(len(table), dtype=float)


def _curve(at: Floats, knots: Floats, values: Floats) -> Floats:
    """Values at `at`; the last segment goes on beyond its end."""
    inside = np.interp(at, knots, values)
    slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    return np.where(at > knots[-1], values[-1] + slope * (at - knots[-1]), inside)


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Least squares with intercept and slope of at least 0."""
    slope, intercept = np.polyfit(x, y, 1)
    if slope < 0:
        return float(y.mean()), 0.0
    if intercept < 0:
        return 0.0, float((x @ y) / (x @ x))
    return float(intercept), float(slope)
