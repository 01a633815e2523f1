"""Memory that nixl reads into, from where blocks are copied to their places.

    free ──lend──▶ lent ──give──▶ free           its read is over, and its blocks were copied
                    │
                    └──write_off──▶ out ──give_late──▶ gone      once the read is over at last

A slot whose read may still write into it is never lent: nothing stops such a read.
"""

import asyncio
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtransfer.transports.nixl_agent import Agent
from pdserve.domain.errors import LocalFault, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.engine.kv_store import BlockRun, KvStore

SLOT_BYTES = 1 << 20
NUM_SLOTS = 32
MAX_NUM_OUT = 96
"""Slots that wait for reads of silent peers; while there are more, nothing is read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which memory: the host's, or that of one GPU."""

    kind: str  # as the library calls it
    device: int

    @classmethod
    def of(cls, memory: KvStore) -> "Place":
        """Raises `LocalFault` for memory that the library cannot reach."""
        if memory.host_blocks(()) is not None:
            return HOST
        tensor = memory.tensor()
        if not tensor.is_cuda:
            raise LocalFault(f"transport nixl: it cannot reach the memory of {tensor.device}")
        return cls("VRAM", tensor.device.index or 0)


HOST = Place("DRAM", 0)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that an agent can be told of."""

    place: Place
    address: int
    num_bytes: int

    @classmethod
    def of(cls, memory: KvStore) -> "Span":
        """All blocks of a store, which outlives what is made with the span."""
        place = Place.of(memory)
        num_bytes = memory.num_blocks * memory.layout.block_bytes
        if place != HOST:
            return cls(place, memory.tensor().data_ptr(), num_bytes)
        [first] = memory.host_blocks([BlockId(0)]) or []
        try:
            return cls(place, _address(first), num_bytes)
        finally:
            first.release()

    def register(self, agent: Agent) -> Any:
        self.enter()
        rows = [(self.address, self.num_bytes, self.place.device, "")]
        return agent.register_memory(rows, self.place.kind)

    def prepare(self, agent: Agent, of: str, block_bytes: int) -> Any:
        """One row stands for all blocks, however many; `of` is the agent's name, "" for our own."""
        count = self.num_bytes // block_bytes
        row = (self.address, block_bytes, self.place.device, block_bytes, count)
        return agent.prep_xfer_dlist(of, np.array([row], dtype=np.uint64), self.place.kind)

    def enter(self) -> None:
        """This thread speaks to the GPU that the bytes are on."""
        if self.place != HOST:
            import torch

            torch.cuda.set_device(self.place.device)


def _address(buffer: mmap.mmap | memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


class Slot:
    """Some memory, of the host or a GPU. What the agent knows of it is made by its thread."""

    def __init__(self, place: Place, num_bytes: int) -> None:
        self.place = place
        self.num_bytes = num_bytes
        self._prepared: dict[int, Any] = {}  # by the size of a block
        self._registered: Any = None
        if place == HOST:
            self._map = mmap.mmap(-1, num_bytes)
            self._span = Span(place, _address(self._map), num_bytes)
        else:
            import torch

            device = torch.device("cuda", place.device)
            self._tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            self._span = Span(place, self._tensor.data_ptr(), num_bytes)

    def prepared(self, agent: Agent, block_bytes: int) -> Any:
        """Its blocks, for a transfer; made once for each size."""
        if self._registered is None:
            self._registered = self._span.register(agent)
        if block_bytes not in self._prepared:
            self._prepared[block_bytes] = self._span.prepare(agent, "", block_bytes)
        return self._prepared[block_bytes]

    async def copy_to(self, memory: KvStore, block_ids: Sequence[BlockId]) -> None:
        """The first blocks of the slot, in order."""
        runs: list[BlockRun] = []
        for place, block in enumerate(block_ids):
            if runs and block == runs[-1].local + runs[-1].count:
                runs[-1] = BlockRun(runs[-1].remote, runs[-1].local, runs[-1].count + 1)
            else:
                runs.append(BlockRun(place, block, 1))
        if self.place == HOST:
            await memory.copy_in(self._map, runs)
        else:
            await memory.copy_within(self._tensor, runs)

    def forget(self, agent: Agent) -> None:
        """To be called on the agent's thread before `free`."""
        while self._prepared:
            self._prepared.popitem()[1].release()
        if self._registered is not None:
            agent.deregister_memory(self._registered)
            self._registered = None

    def free(self) -> None:
        if self.place == HOST:
            self._map.close()
        else:
            del self._tensor


class Slots:
    """Lends at most `num_slots` at a time and keeps as many for the next reads.

    `discard` is given every slot that is not kept, to have the agent forget and free it.
    """

    def __init__(self, discard: Callable[[Slot], object], *, num_slots: int = NUM_SLOTS) -> None:
        self.num_out = 0
        self.all: set[Slot] = set()  # for the end: nobody may free what is read into
        self._discard = discard
        self._free = asyncio.Semaphore(num_slots)
        self._num_slots = num_slots
        self._num_lent = 0
        self._idle: list[Slot] = []  # what was used last comes last: it may still be in a cache

    async def lend(self, place: Place, block_bytes: int) -> Slot:
        """Wait for a slot with room for a block at least; whoever holds one must not wait.

        Raises `TransferFailed` while too many are out.
        """
        self._check()
        await self._free.acquire()
        self._num_lent += 1
        return self._take(place, block_bytes)

    async def lend_if_free(self, place: Place, block_bytes: int) -> Slot | None:
        return None if self._free.locked() else await self.lend(place, block_bytes)

    def _check(self) -> None:
        if self.num_out > MAX_NUM_OUT:
            raise TransferFailed(f"{self.num_out} reads of silent peers are still under way")

    def _take(self, place: Place, block_bytes: int) -> Slot:
        for index in range(len(self._idle) - 1, -1, -1):
            slot = self._idle[index]
            if slot.place == place and slot.num_bytes >= block_bytes:
                return self._idle.pop(index)
        if len(self._idle) + self._num_lent > self._num_slots:
            self._drop(self._idle.pop(0))
        slot = Slot(place, max(SLOT_BYTES, block_bytes))
        self.all.add(slot)
        return slot

    def give(self, slot: Slot) -> None:
        """Take back what was lent, once nothing writes into it."""
        self._idle.append(slot)
        self._end_loan()

    def write_off(self) -> None:
        """A lent slot is out: others may be lent in its place."""
        self.num_out += 1
        self._end_loan()

    def give_late(self, slot: Slot) -> None:
        """Take back what was written off, once nothing writes into it."""
        self.num_out -= 1
        self._drop(slot)

    def _end_loan(self) -> None:
        self._num_lent -= 1
        self._free.release()

    def _drop(self, slot: Slot) -> None:
        self.all.discard(slot)
        self._discard(slot)
