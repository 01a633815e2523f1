"""Step times that bounds and estimates read, beyond the end of a worker's tables."""

import numpy as np
import pytest

from pdserve.domain.latency import StepCoefficients
from placement.search.bounds import Bounds
from placement.search.designs import Worker
from placement.search.phase_times import phase_times
from placement.simulation.timing import StepTiming
from placement.simulation.values import Pool, PoolRole, Rules, TrafficClass

TERMS = StepCoefficients(
    fixed_s=0.001,
    prefill_token_s=5e-5,
    prefill_attention_s=0.0,
    decode_token_s=2e-4,
    decode_context_token_s=1e-7,
)


PROMPT, OUTPUT = 100, 40
SAMPLE = (np.full(4, PROMPT, np.int64), np.full(4, OUTPUT, np.int64))


def decode_worker(pp: int = 1) -> Worker:
    pool = Pool(role=PoolRole.DECODE, replicas=1, timing=StepTiming.of_coefficients(TERMS), pp=pp)
    return Worker(
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


@pytest.mark.parametrize("pp", [1, 2])
def test_a_line_of_two_points_goes_on_to_any_batch(pp: int) -> None:
    times = phase_times(
        decode_worker(pp), Rules.PDSERVE, SAMPLE, max_step_tokens=512, max_batch=64, ttft_s=1.0
    )
    size = -(-times.batches // pp)
    context = PROMPT + OUTPUT / 2
    each = TERMS.decode_token_s + TERMS.decode_context_token_s * context
    assert times.step_s == pytest.approx(TERMS.fixed_s + size * each)
    assert times.batches[-1] == 64


def test_places_are_for_those_who_are_read_as_well_as_for_the_batch() -> None:
    slo = TrafficClass(ttft_s=OUTPUT * 0.02, tpot_s=0.02)  # reading may take as long as answering
    worker = decode_worker()
    bounds = Bounds(
        [worker], Rules.PDSERVE, (slo,), SAMPLE, gap_cv=1.0, max_step_tokens=512, max_batch=512
    )
    assert bounds.largest_batch(worker) > 1
    assert bounds.places(worker) == 2 * bounds.largest_batch(worker)
