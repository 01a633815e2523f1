"""How long one turn of the event loop keeps everyone waiting."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence


def longest_s(turns_s: Sequence[float]) -> float:
    """The longest turn but one.

    A machine that the host stops for seconds adds them to the turn that it interrupts. What holds
    up the event loop must therefore happen twice in a test to be seen.
    """
    return sorted(turns_s)[-2]


@contextlib.asynccontextmanager
async def watch_turns() -> AsyncIterator[list[float]]:
    """Processor time of this process in each turn of the event loop until now, seconds.

    A thread that holds the interpreter's lock counts; what other processes do does not.
    """
    turns_s: list[float] = []

    async def watch() -> None:
        while True:
            started_s = time.process_time()
            await asyncio.sleep(0.001)  # ends in the first turn after a millisecond
            turns_s.append(time.process_time() - started_s)

    watching = asyncio.create_task(watch())
    try:
        yield turns_s
    finally:
        watching.cancel()
        await asyncio.wait([watching])
