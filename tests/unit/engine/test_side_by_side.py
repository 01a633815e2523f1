import asyncio

import pytest

from pdserve.engine.side_by_side import side_by_side


async def test_results_come_in_the_order_of_the_calls() -> None:
    async def later(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await side_by_side([later(turns) for turns in (3, 0, 1)]) == [3, 0, 1]
    assert await side_by_side([later(2)]) == [2]
    nobody: list[int] = await side_by_side([])
    assert nobody == []


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_no_call_outlives_a_failure_or_a_cancellation(is_cancelled: bool) -> None:
    ends: list[str] = []
    fails = asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ends.append("over")

    async def failing() -> None:
        await fails.wait()
        raise ZeroDivisionError

    both = asyncio.create_task(side_by_side([slow_to_end(), failing()]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if is_cancelled:
        both.cancel()
    else:
        fails.set()
    await asyncio.wait([both])
    assert ends == ["over"]
    assert both.cancelled() is is_cancelled
    if not is_cancelled:
        assert isinstance(both.exception(), ZeroDivisionError)
