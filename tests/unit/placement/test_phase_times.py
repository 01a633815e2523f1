"""Step times that bounds and estimates read, beyond the end of a worker's tables."""

import numpy as np
import pytest

from pdserve.domain.latency import StepCoefficients
from placement.search.designs import Worker
from placement.search.phase_times import phase_times
from placement.simulation.timing import StepTiming
from placement.simulation.values import Pool, PoolRole, Rules

TERMS = StepCoefficients(
    fixed_s=0.001,
    prefill_token_s=5e-5,
    prefill_attention_s=0.0,
    decode_token_s=2e-4,
    decode_context_token_s=1e-7,
)


@pytest.mark.parametrize("pp", [1, 2])
def test_a_line_of_two_points_goes_on_to_any_batch(pp: int) -> None:
    pool = Pool(role=PoolRole.DECODE, replicas=1, timing=StepTiming.of_coefficients(TERMS), pp=pp)
    worker = Worker(
        role=PoolRole.DECODE,
        gpu="g",
        tp=1,
        pp=pp,
        ep=1,
        pool=pool,
        usd_per_hour=0.0,
        watts=0.0,
        source="",
        relative_error=0.0,
    )
    sample = (np.full(4, 100, np.int64), np.full(4, 40, np.int64))
    times = phase_times(
        worker, Rules.PDSERVE, sample, max_step_tokens=512, max_batch=64, ttft_s=1.0
    )
    size = -(-times.batches // pp)
    expected = TERMS.fixed_s + size * (TERMS.decode_token_s + 1e-7 * (100 + 40 / 2))
    assert times.step_s == pytest.approx(expected)
    assert times.batches[-1] == 64
