"""Paged KV memory that other processes on this host can read."""

import contextlib
import fcntl
import mmap
import os

from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout


class KvMemory:
    """`num_blocks` blocks of `layout.block_bytes`, block 0 first, zeroed.

    The memory is an anonymous file (memfd): a reader on the same host opens it through
    /proc/PID/fd, and no name is left behind however the process ends. Where the system has no
    memfd (not Linux) it is private memory and only network transports apply.
    """

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
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

    def close(self) -> None:
        """Give the memory back once no view of it is left; safe to call twice."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.bytes.release()
        with contextlib.suppress(BufferError):  # an engine's tensor still views it: freed with it
            self._map.close()
