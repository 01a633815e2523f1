"""Host memory that blocks pass through on their way into blocks of another shape."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from pdserve.domain.layout import KvLayout
from pdserve.engine.kv_memory import KvMemory

SLOT_BYTES = 8 << 20
NUM_SLOTS = 8


class Staging:
    """Lends at most `num_slots` memories at a time and keeps as many for the next ones.

    Each has blocks of the layout that is asked for: as many as fit into `slot_bytes`, and at least
    as many as are asked for. Whoever made this closes it once nothing is lent.
    """

    def __init__(self, *, slot_bytes: int = SLOT_BYTES, num_slots: int = NUM_SLOTS) -> None:
        self._slot_bytes = slot_bytes
        self._num_slots = num_slots
        self._free = asyncio.Semaphore(num_slots)
        self._idle: list[KvMemory] = []  # the one that was used last comes last
        self._num_lent = 0

    @property
    def num_bytes(self) -> int:
        """Of what is kept for the next ones."""
        return sum(memory.num_bytes for memory in self._idle)

    @contextlib.asynccontextmanager
    async def lend(self, layout: KvLayout, num_blocks: int = 1) -> AsyncIterator[KvMemory]:
        """Memory of `num_blocks` blocks of `layout` at least, of any content; nobody may touch it
        after the context.

        Waits for a slot. Whoever holds one must not wait for another of the same staging.
        """
        async with self._free:
            memory = self._take(layout, num_blocks)
            self._num_lent += 1
            try:
                yield memory
            finally:
                self._num_lent -= 1
                self._idle.append(memory)

    def _take(self, layout: KvLayout, num_blocks: int) -> KvMemory:
        for place in range(len(self._idle) - 1, -1, -1):
            idle = self._idle[place]
            if idle.layout == layout and idle.num_blocks >= num_blocks:
                return self._idle.pop(place)
        if len(self._idle) + self._num_lent >= self._num_slots:
            self._idle.pop(0).close()
        return KvMemory(layout, max(num_blocks, self._slot_bytes // layout.block_bytes))

    def close(self) -> None:
        """Give the memory back; safe to call twice."""
        while self._idle:
            self._idle.pop().close()
