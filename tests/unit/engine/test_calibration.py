"""The measurement finds the coefficients that an engine has."""

import pytest

from pdserve.config.processes import CoefficientSettings
from pdserve.domain.latency import StepCoefficients
from pdserve.engine.calibration import measure_coefficients
from pdserve.engine.timed_engine import TimedEngine
from tests.support.virtual_time import virtual
from tests.support.worker_pair import LAYOUT, demo_files

TRUE = StepCoefficients(
    fixed_s=2e-3,
    prefill_token_s=3e-5,
    prefill_attention_s=4e-8,
    decode_token_s=5e-4,
    decode_context_token_s=6e-7,
)


def engine_of(coefficients: StepCoefficients, num_blocks: int = 1200) -> TimedEngine:
    return TimedEngine(
        demo_files(),
        block_size=LAYOUT.block_size,
        num_blocks=num_blocks,
        coefficients=coefficients,
        layout=LAYOUT,
    )


@virtual
async def test_coefficients_of_a_linear_engine_are_recovered() -> None:
    engine = engine_of(TRUE)
    found = await measure_coefficients(engine, None)
    for name in StepCoefficients.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6, abs=1e-9)
    engine.close()


@virtual
async def test_term_that_costs_nothing_never_becomes_negative() -> None:
    flat = StepCoefficients(
        fixed_s=1e-2,
        prefill_token_s=1e-5,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    )
    engine = engine_of(flat)
    found = await measure_coefficients(engine, None)
    assert found.fixed_s == pytest.approx(1e-2, rel=1e-6)
    assert min(found.decode_token_s, found.decode_context_token_s, found.prefill_attention_s) >= 0
    engine.close()


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 130])
def test_batches_fit_a_small_memory(num_blocks: int) -> None:
    @virtual
    async def run() -> None:
        engine = engine_of(TRUE, num_blocks)
        found = await measure_coefficients(engine, None)
        assert found.relative_error < 1e-6
        engine.close()

    run()


@virtual
async def test_given_coefficients_are_taken_without_a_step() -> None:
    engine = engine_of(TRUE)
    given = CoefficientSettings(fixed_s=1.0, prefill_token_s=2.0, decode_token_s=3.0)
    found = await measure_coefficients(engine, given)
    assert (found.fixed_s, found.prefill_token_s, found.decode_token_s) == (1.0, 2.0, 3.0)
    assert engine._free_at_s == 0.0
    engine.close()
