"""The measurement finds the coefficients that an engine has."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from deploy.simulated.virtual_time import virtual
from pdserve.config.processes import CoefficientSettings
from pdserve.domain.latency import StepCoefficients
from pdserve.engine.calibration import measure_coefficients
from pdserve.engine.contract import StepBatch, StepResult
from pdserve.engine.timed_engine import TimedEngine
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


class HinderedEngine:
    """A timed engine on a busy machine: `delay_s` is asked for what each step takes longer."""

    looks_ahead = False

    def __init__(self, inner: TimedEngine, delay_s: Callable[[int], float]) -> None:
        self.spec, self.kv = inner.spec, inner.kv
        self._inner = inner
        self._delay_s = delay_s
        self._num_steps = 0

    async def step(self, batch: StepBatch) -> StepResult:
        self._num_steps += 1
        result = await self._inner.step(batch)
        return replace(result, elapsed_s=result.elapsed_s + self._delay_s(self._num_steps))

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("seed", range(20))
def test_request_in_a_batch_never_costs_nothing_however_busy_the_machine(seed: int) -> None:
    rng = Random(seed)

    @virtual
    async def run() -> None:
        engine = HinderedEngine(engine_of(TRUE), lambda number: rng.choice((0.0, 0.02, 0.1, 0.3)))
        found = await measure_coefficients(engine, None)
        assert found.decode_token_s > 0, f"seed {seed}"
        engine.close()

    run()


@virtual
async def test_busy_moment_does_not_fall_on_every_run_of_one_batch() -> None:
    engine = HinderedEngine(engine_of(TRUE), lambda number: 0.1 if 11 <= number < 20 else 0.0)
    found = await measure_coefficients(engine, None)
    assert found.decode_token_s == pytest.approx(TRUE.decode_token_s, rel=1e-6)
    assert found.fixed_s == pytest.approx(TRUE.fixed_s, rel=1e-6)
    engine.close()
