"""Several calls at once, of which none outlives the others."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def side_by_side(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What each call returns, in order. Cancelled, it raises once all of them are over.

    If one fails, the others are cancelled, and its error is raised once they are over.
    """
    if len(calls) == 1:
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(call) for call in calls]
    except BaseExceptionGroup as group:  # the first to fail comes first
        raise group.exceptions[0] from None
    return [task.result() for task in running]
