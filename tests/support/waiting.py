"""Waiting for what gives no signal: look again until a deadline."""

import asyncio
import time
from collections.abc import Callable

LOOK_EVERY_S = 0.02


async def wait_until(condition: Callable[[], bool], *, within_s: float, what: str) -> float:
    """Return how long it took until `condition()`; fails naming `what` after `within_s`."""
    started = time.monotonic()
    while not condition():
        elapsed_s = time.monotonic() - started
        assert elapsed_s < within_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(LOOK_EVERY_S)
    return time.monotonic() - started
