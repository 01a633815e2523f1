import numpy as np
import pytest

from pdserve.domain.latency import StepCoefficients
from placement.linear_steps import linear_steps
from placement.simulation.timing import StepTiming
from placement.simulation.values import Pool, PoolRole

TERMS = StepCoefficients(
    fixed_s=0.004,
    prefill_token_s=5e-5,
    prefill_attention_s=2e-8,
    decode_token_s=3e-4,
    decode_context_token_s=4e-7,
)


@pytest.mark.parametrize("role", list(PoolRole))
def test_straight_lines_come_back_as_they_were(role: PoolRole) -> None:
    pool = Pool(role=role, replicas=1, timing=StepTiming.of_coefficients(TERMS))
    found = linear_steps(pool, max_step_tokens=512, max_num_requests=64)
    for name in ("fixed_s", "prefill_token_s", "prefill_attention_s"):
        assert getattr(found, name) == pytest.approx(getattr(TERMS, name), rel=1e-6)
    assert found.decode_token_s == pytest.approx(TERMS.decode_token_s, rel=1e-6)
    assert found.decode_context_token_s == pytest.approx(TERMS.decode_context_token_s, rel=1e-6)
    assert found.relative_error < 1e-6


def test_times_are_those_of_the_whole_pipeline() -> None:
    timing = StepTiming.of_coefficients(TERMS)
    pool = Pool(role=PoolRole.DECODE, replicas=1, timing=timing, pp=4)
    found = linear_steps(pool, max_step_tokens=512, max_num_requests=64)
    assert found.fixed_s == pytest.approx(TERMS.fixed_s)
    assert found.decode_token_s == pytest.approx(TERMS.decode_token_s)


def test_a_bent_curve_is_met_within_the_stated_error_and_never_below_zero() -> None:
    knots = np.array([1.0, 64.0, 512.0])
    timing = StepTiming(
        prefill_tokens=knots,
        prefill_s=np.array([1e-4, 1e-4, 0.08]),  # flat, then steep: the line begins below zero
        pair_s=np.zeros(3),
        decode_s=np.array([0.0, 0.02, 0.02]),
        context_s=np.zeros(3),
    )
    pool = Pool(role=PoolRole.PREFILL, replicas=1, timing=timing)
    found = linear_steps(pool, max_step_tokens=512, max_num_requests=64)
    assert found.fixed_s >= 0
    whole_s = found.fixed_s + 512 * found.prefill_token_s
    assert whole_s == pytest.approx(0.08, rel=0.2)
    assert found.relative_error > 0
    assert found.decode_token_s == pytest.approx(0, abs=1e-9)
