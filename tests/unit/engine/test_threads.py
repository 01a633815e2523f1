import asyncio
import threading
from collections.abc import Callable

import pytest

from pdserve.engine.threads import run_to_end


async def test_the_result_of_the_work_comes_back() -> None:
    assert await run_to_end(lambda is_cancelled: threading.current_thread().name) != (
        threading.current_thread().name
    )


async def test_an_exception_of_the_work_comes_back() -> None:
    def work(is_cancelled: Callable[[], bool]) -> None:
        raise LookupError("in the thread")

    with pytest.raises(LookupError, match="in the thread"):
        await run_to_end(work)


@pytest.mark.parametrize("num_cancels", [1, 3])
async def test_a_cancelled_call_returns_only_after_the_work_stopped(num_cancels: int) -> None:
    is_started = threading.Event()
    may_stop = threading.Event()
    has_stopped = threading.Event()

    def work(is_cancelled: Callable[[], bool]) -> None:
        is_started.set()
        while not is_cancelled():
            pass
        may_stop.wait(10)
        has_stopped.set()

    task = asyncio.create_task(run_to_end(work))
    await asyncio.to_thread(is_started.wait, 10)
    for _ in range(num_cancels):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    may_stop.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert has_stopped.is_set()


async def test_a_failure_after_cancellation_stays_silent() -> None:
    is_started = threading.Event()

    def work(is_cancelled: Callable[[], bool]) -> None:
        is_started.set()
        while not is_cancelled():
            pass
        raise LookupError("too late to matter")

    task = asyncio.create_task(run_to_end(work))
    await asyncio.to_thread(is_started.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
