"""Paged KV memory that other processes on this host can read."""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.layout import KvLayout
from pdserve.engine.digest import block_digest, word_sums
from pdserve.engine.kv_store import BlockRun, HostBuffer
from pdserve.engine.threads import run_to_end

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# All bits of the exponent: set in NaN and infinity alone.
_EXPONENTS = {
    "float32": (np.uint32, np.uint32(0x7F800000)),
    "float16": (np.uint16, np.uint16(0x7C00)),
    "bfloat16": (np.uint16, np.uint16(0x7F80)),
}


class KvMemory:
    """Satisfies `KvStore` in the host's memory: block 0 first, zeroed.

    The memory is an anonymous file (memfd): a reader on the same host opens it through
    /proc/PID/fd, and no name is left behind however the process ends. Where the system has no
    memfd (not Linux) it is private memory and only network transports apply.

    `holds_numbers` is false for an engine that keeps other things than numbers of `layout.dtype`.
    Work on at most `thread_above_bytes` takes less time than handing it to a thread.
    """

    thread_above_bytes = 1 << 20

    def __init__(self, layout: KvLayout, num_blocks: int, *, holds_numbers: bool = True) -> None:
        self.layout = layout
        self._holds_numbers = holds_numbers
        self.num_blocks = num_blocks
        self.num_bytes = layout.block_bytes * num_blocks
        self.fd: int | None = None
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.num_bytes)
            # A file that shrank under a reader's map would kill the reader.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, self.num_bytes)
        else:
            self._map = mmap.mmap(-1, self.num_bytes)
        self.bytes = memoryview(self._map)
        word_sums()  # compiled before there is an event loop

    def block(self, block_id: BlockId) -> memoryview:
        """The bytes of one block, writable."""
        start = block_id * self.layout.block_bytes
        return self.bytes[start : start + self.layout.block_bytes]

    def host_blocks(self, block_ids: Sequence[BlockId]) -> list[memoryview]:
        size = self.layout.block_bytes
        return [self.bytes[block * size : (block + 1) * size] for block in block_ids]

    def tensor(self) -> "Tensor":
        import torch  # an engine does; who only moves blocks must not need to

        return torch.frombuffer(self.bytes, dtype=torch.uint8).view(self.num_blocks, -1)

    async def copy_in(self, source: HostBuffer, runs: Sequence[BlockRun]) -> None:
        spans = [(run.local, run.remote, run.count) for run in runs]
        await self._copy(self.bytes, source, spans)

    async def copy_within(self, source: "Tensor", runs: Sequence[BlockRun]) -> None:
        await self.copy_in(source.numpy().data, runs)

    async def copy_out(self, target: HostBuffer, runs: Sequence[BlockRun]) -> None:
        spans = [(run.remote, run.local, run.count) for run in runs]
        await self._copy(target, self.bytes, spans)

    async def _copy(
        self, target: HostBuffer, source: HostBuffer, spans: Sequence[tuple[int, int, int]]
    ) -> None:
        """By numpy, whose copies let other threads run, unlike those of memoryview."""
        size = self.layout.block_bytes

        def copy(is_cancelled: Callable[[], bool]) -> None:
            to, of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
            for to_block, of_block, count in spans:
                if is_cancelled():
                    return
                start, place, num_bytes = of_block * size, to_block * size, count * size
                to[place : place + num_bytes] = of[start : start + num_bytes]

        await self._work(sum(count for _, _, count in spans), copy)

    async def digests(
        self, handoff: HandoffId, block_indices: Sequence[int], block_ids: Sequence[BlockId]
    ) -> list[bytes]:
        def digest(is_cancelled: Callable[[], bool]) -> list[bytes]:
            return [
                block_digest(handoff, index, self.block(block_id))
                for index, block_id in zip(block_indices, block_ids, strict=True)
                if not is_cancelled()
            ]

        return await self._work(len(block_ids), digest)

    async def _work(self, num_blocks: int, work: Callable[[Callable[[], bool]], T]) -> T:
        if num_blocks * self.layout.block_bytes <= self.thread_above_bytes:
            return work(lambda: False)
        return await run_to_end(work)

    async def are_sound(self, block_ids: Sequence[BlockId]) -> list[bool]:
        if not self._holds_numbers:
            return [True] * len(block_ids)
        kind, exponent = _EXPONENTS[self.layout.dtype]

        def check(is_cancelled: Callable[[], bool]) -> list[bool]:
            return [
                not ((np.frombuffer(self.block(block), kind) & exponent) == exponent).any()
                for block in block_ids
                if not is_cancelled()
            ]

        return await self._work(len(block_ids), check)

    def divided(self, num_parts: int) -> "KvMemory":
        """The same bytes as memory of parts of blocks (`KvLayout.part`); this one stays the owner.

        What is made here is not to be used after `close` of this one.
        """
        return _DividedMemory(self, num_parts)

    def close(self) -> None:
        """Give the memory back once no view of it is left; safe to call twice."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.bytes.release()
        with contextlib.suppress(BufferError):  # an engine's tensor still views it: freed with it
            self._map.close()


class _DividedMemory(KvMemory):
    def __init__(self, whole: KvMemory, num_parts: int) -> None:
        self.layout = whole.layout.part(num_parts)
        self.num_blocks = whole.num_blocks * num_parts
        self.num_bytes = whole.num_bytes
        self.fd = whole.fd
        self.bytes = whole.bytes
        self._holds_numbers = whole._holds_numbers

    def close(self) -> None:
        """The whole's owner closes it."""
