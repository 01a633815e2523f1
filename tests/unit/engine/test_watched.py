"""`WatchedEngine`: the age of the step in progress."""

import asyncio

import pytest

from pdserve.domain.latency import StepCoefficients
from pdserve.engine.contract import StepBatch, StepResult
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.timed_engine import TimedEngine
from pdserve.engine.watched import WatchedEngine


class _HeldEngine(TimedEngine):
    """Its step ends when the test says so."""

    is_failing = False

    def __init__(self) -> None:
        coefficients = StepCoefficients(
            fixed_s=0,
            prefill_token_s=0,
            prefill_attention_s=0,
            decode_token_s=0,
            decode_context_token_s=0,
        )
        super().__init__(
            ModelFiles.open("demo"), block_size=16, num_blocks=4, coefficients=coefficients
        )
        self.may_end = asyncio.Event()

    async def step(self, batch: StepBatch) -> StepResult:
        await self.may_end.wait()
        if self.is_failing:
            raise RuntimeError("the step failed")
        return StepResult(sampled=(), elapsed_s=0.0)


@pytest.mark.parametrize("is_failing", [False, True])
async def test_step_ages_while_it_runs_and_not_after(is_failing: bool) -> None:
    now_s = 100.0
    inner = _HeldEngine()
    inner.is_failing = is_failing
    engine = WatchedEngine(inner, lambda: now_s)
    assert engine.step_age_s == 0
    step = asyncio.create_task(engine.step(StepBatch(())))
    await asyncio.sleep(0)
    now_s = 170.0
    assert engine.step_age_s == 70
    inner.may_end.set()
    await asyncio.wait([step])
    assert (step.exception() is not None) is is_failing
    now_s = 500.0
    assert engine.step_age_s == 0
    engine.close()


class _TurnEngine(_HeldEngine):
    """Ends a step for each thing in `turns`, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = asyncio.Queue[None]()

    async def step(self, batch: StepBatch) -> StepResult:
        await self.turns.get()
        return StepResult(sampled=(), elapsed_s=0.0)


async def test_a_step_behind_another_one_is_as_old_as_the_end_of_that() -> None:
    now_s = 100.0
    inner = _TurnEngine()
    engine = WatchedEngine(inner, lambda: now_s)
    first, second = (asyncio.create_task(engine.step(StepBatch(()))) for _ in range(2))
    await asyncio.sleep(0)
    now_s = 160.0
    assert engine.step_age_s == 60
    inner.turns.put_nowait(None)
    await asyncio.wait([first])
    now_s = 165.0
    assert engine.step_age_s == 5
    inner.turns.put_nowait(None)
    await asyncio.wait([second])
    assert engine.step_age_s == 0
    engine.close()
