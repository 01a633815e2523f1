"""Prompts of any length, taken in without holding up the event loop."""

import asyncio
from collections.abc import Sequence

from pdserve.domain.tokens import slices
from router.admission import ServedModel, check_token_values


async def checked_token_ids(
    token_ids: Sequence[int], model: ServedModel, *, field: str
) -> tuple[int, ...]:
    """The ids as a tuple; raises `BadRequest` for one beyond the vocabulary.

    A million of them take a tenth of a second: others get their turn after each slice.
    """
    checked: list[int] = []
    for part in slices(token_ids):
        if checked:
            await asyncio.sleep(0)
        check_token_values(part, model, field=field, first=len(checked))
        checked += part
    return tuple(checked)
