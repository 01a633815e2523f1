"""Work on long prompts, kept off the event loop."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

LONG_PROMPT_TOKENS = 32_768
"""What is done to a prompt of this length takes up to 5 ms."""


async def off_loop(num_tokens: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do `work` on a prompt of `num_tokens`: here, or in a thread if it is long.

    The event loop gets its turn between any two steps of the thread, so `work` must take long
    prompts in slices (`pdserve.domain.tokens.slices`): a single call into C holds up everything.
    """
    if num_tokens <= LONG_PROMPT_TOKENS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
