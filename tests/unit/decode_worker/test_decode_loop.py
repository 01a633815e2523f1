"""Joining and leaving between, and during, steps."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from decode_worker.decode_loop import DecodeLoop
from decode_worker.requests import DecodeRequest
from deploy.simulated.virtual_time import virtual
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.contract import StepBatch, StepResult
from pdserve.engine.step_table import StepTable
from pdserve.engine.timed_engine import TimedEngine
from tests.support.worker_pair import COEFFICIENTS, borrow_engine
from tests.unit.decode_worker.test_intake import request_of


class WatchedEngine:
    """`inner`, but `at_end` is called when a step has computed, before anyone hears of it."""

    looks_ahead = False

    def __init__(self, inner: TimedEngine, at_end: Callable[[], object]) -> None:
        self.spec, self.kv = inner.spec, inner.kv
        self._inner = inner
        self._at_end = at_end

    async def step(self, batch: StepBatch) -> StepResult:
        result = await self._inner.step(batch)
        self._at_end()
        return result

    def close(self) -> None: ...


async def serve(request: DecodeRequest, loop: DecodeLoop) -> None:
    loop.join(request)
    try:
        await request.finished
    finally:
        loop.leave(request)
        assert request.table is not None
        request.table.release()


def reserved(pool: BlockPool) -> DecodeRequest:
    request = request_of(2)
    table = pool.reserve(2)
    assert table is not None
    request.table = StepTable(table, lambda: None)
    return request


@pytest.mark.parametrize("is_last_token", [True, False])
def test_cancelled_in_the_turn_of_its_token_neither_stops_the_loop_nor_takes_the_token(
    is_last_token: bool,
) -> None:
    @virtual
    async def run() -> None:
        pool, inner = BlockPool(4), borrow_engine(4)
        victims: list[asyncio.Task[None]] = []
        engine = WatchedEngine(inner, lambda: [task.cancel() for task in victims])
        clock = asyncio.get_running_loop().time
        loop = DecodeLoop(
            engine,
            coefficients=COEFFICIENTS,
            max_step_tokens=8 if is_last_token else 4,
            clock=clock,
        )
        running = asyncio.create_task(loop.run())
        request = reserved(pool)
        victims.append(asyncio.create_task(serve(request, loop)))
        await asyncio.wait(victims)
        assert victims[0].cancelled()
        victims.clear()
        await asyncio.sleep(0.1)
        assert not running.done(), "the loop serves everyone else"
        assert pool.usage().is_idle
        assert request.num_output_tokens == 0

        other = reserved(pool)
        await serve(other, loop)
        assert other.num_output_tokens == 1
        running.cancel()
        await asyncio.wait([running])
        inner.close()

    run()


@virtual
async def test_blocks_of_a_request_that_leaves_during_a_step_wait_for_its_end() -> None:
    pool, inner = BlockPool(4), borrow_engine(4)
    used: list[Any] = []
    engine = WatchedEngine(inner, lambda: used.append(pool.usage().held))
    loop = DecodeLoop(
        engine,
        coefficients=COEFFICIENTS,
        max_step_tokens=8,
        clock=asyncio.get_running_loop().time,
    )
    running = asyncio.create_task(loop.run())
    serving = asyncio.create_task(serve(reserved(pool), loop))
    await asyncio.sleep(0.001)
    serving.cancel()
    await asyncio.wait([serving])
    await asyncio.sleep(0.1)
    assert used == [2]
    assert pool.usage().is_idle
    running.cancel()
    await asyncio.wait([running])
    inner.close()
