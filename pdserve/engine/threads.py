"""Work on a thread whose caller can be cancelled without losing track of it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def run_to_end(
    work: Callable[[Callable[[], bool]], T], executor: Executor | None = None
) -> T:
    """Run `work` on a thread and wait until it is over, even when cancelled.

    `work` is given a function that turns True on cancellation, so that it can stop early. It is
    never running any more when this call has returned or raised.
    """
    stop = threading.Event()
    future = asyncio.get_running_loop().run_in_executor(executor, work, stop.is_set)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):  # raised again below
                await asyncio.wait([future])
        future.exception()
        raise
