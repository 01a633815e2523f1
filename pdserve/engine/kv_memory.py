"""Paged KV memory that other processes on this host can read."""

import contextlib
import fcntl
import mmap
import os

import numpy as np

from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout

# All bits of the exponent: set in NaN and infinity alone.
_EXPONENTS = {
    "float32": (np.uint32, np.uint32(0x7F800000)),
    "float16": (np.uint16, np.uint16(0x7C00)),
    "bfloat16": (np.uint16, np.uint16(0x7F80)),
}


class KvMemory:
    """`num_blocks` blocks of `layout.block_bytes`, block 0 first, zeroed.

    The memory is an anonymous file (memfd): a reader on the same host opens it through
    /proc/PID/fd, and no name is left behind however the process ends. Where the system has no
    memfd (not Linux) it is private memory and only network transports apply.

    `holds_numbers` is false for an engine that keeps other things than numbers of `layout.dtype`.
    """

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

    def block(self, block_id: BlockId) -> memoryview:
        """The bytes of one block, writable."""
        start = block_id * self.layout.block_bytes
        return self.bytes[start : start + self.layout.block_bytes]

    def is_sound(self, block_id: BlockId) -> bool:
        """No number in the block is NaN or infinite, so that it may be shared by its name."""
        if not self._holds_numbers:
            return True
        kind, exponent = _EXPONENTS[self.layout.dtype]
        words = np.frombuffer(self.block(block_id), dtype=kind)
        return not bool(((words & exponent) == exponent).any())

    def close(self) -> None:
        """Give the memory back once no view of it is left; safe to call twice."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.bytes.release()
        with contextlib.suppress(BufferError):  # an engine's tensor still views it: freed with it
            self._map.close()
