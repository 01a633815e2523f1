"""Prompts of any length, taken in without holding up the event loop."""

import asyncio
from collections.abc import Sequence

from router.admission import ServedModel, check_token_values

SLICE_TOKENS = 16_384
"""Token ids that are looked at between two turns of the event loop: 2 ms of a million's 100 ms."""


async def checked_token_ids(
    token_ids: Sequence[int], model: ServedModel, *, field: str
) -> tuple[int, ...]:
    """The ids as a tuple; raises `BadRequest` for one beyond the vocabulary."""
    checked: list[int] = []
    for first in range(0, len(token_ids), SLICE_TOKENS):
        if first:
            await asyncio.sleep(0)
        part = list(token_ids[first : first + SLICE_TOKENS])
        check_token_values(part, model, field=field, first=first)
        checked += part
    return tuple(checked)
