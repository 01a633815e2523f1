"""Reading the memory of another process on this host, by mapping it read-only.

    the peer                                    this process
    memfd "pdserve-kv" ◀── /proc/PID/fd/FD ──── mmap(PROT_READ) ── copy ──▶ own KvMemory

The kernel decides who may open /proc/PID/fd: the same user, in the same PID namespace. Such a
process could stop or trace the peer anyway, so no further permission is asked for (`may_read` is
not consulted), and the bytes are trusted only as far as their digests.
"""

import mmap
import os
import select
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from kvtransfer.transports.base import MayRead, OnRead, check_read, ignore
from kvtransfer.transports.divided import ReadsParts
from pdserve.domain.errors import LocalFault, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore, block_runs


def host_identity() -> str:
    """Equal only for processes that see each other's PIDs: boot id and PID namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.readlink('/proc/self/ns/pid')}"


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot: tells a reused PID from the old one."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    return after_name.split()[19]  # field 22 of proc(5), of which the first two are cut off


class ShmRegionServer:
    """Nothing runs here: the region can be read for as long as the memory lives."""

    sees_reads = False

    def __init__(self, region: RemoteRegion) -> None:
        self.region = region

    async def close(self) -> None:
        """Readers that have mapped the memory keep their maps."""


class _Attachment:
    """A peer's memory and the means to notice its death; closed after its last reader left."""

    def __init__(self, memory: mmap.mmap, pidfd: int) -> None:
        self.memory = memory
        self._pidfd = pidfd
        self._num_users = 1  # the transport itself, until it detaches

    @property
    def is_alive(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def __enter__(self) -> Self:
        self._num_users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        self._num_users -= 1
        if self._num_users == 0:
            self.memory.close()
            os.close(self._pidfd)


def _attach(region: RemoteRegion) -> _Attachment:
    """Map a peer's region; raises `TransferFailed` if it is not what the address says."""
    address = region.address
    num_bytes = region.num_blocks * region.block_bytes
    try:
        pid, fd = int(address["pid"]), int(address["fd"])
        pidfd = os.pidfd_open(pid)
    except (KeyError, ValueError, OverflowError, OSError) as error:
        raise TransferFailed("the peer's process is gone") from error
    try:
        # The pidfd is open, so the PID cannot pass to another process unnoticed from here on.
        if start_time(pid) != address.get("start"):
            raise TransferFailed("the peer's process was replaced by another")
        return _Attachment(_map_readonly(f"/proc/{pid}/fd/{fd}", num_bytes), pidfd)
    except (ValueError, IndexError, OSError) as error:
        os.close(pidfd)
        raise TransferFailed("the peer's memory cannot be mapped") from error
    except BaseException:
        os.close(pidfd)
        raise


def _map_readonly(path: str, num_bytes: int) -> mmap.mmap:
    """Checked before it is touched: a map that is longer than its file kills who reads its end."""
    if not os.readlink(path).startswith("/memfd:pdserve-kv"):
        raise TransferFailed("the peer's descriptor is not KV memory")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes or num_bytes == 0:
            raise TransferFailed(f"the peer's memory has {status.st_size} bytes, not {num_bytes}")
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _key(region: RemoteRegion) -> tuple[object, ...]:
    return (*sorted(region.address.items()), region.num_blocks * region.block_bytes)


class ShmTransport(ReadsParts):
    """Same host, same user, same PID namespace: one copy, no work for the peer."""

    name = "shm"

    def __init__(self) -> None:
        self._attachments: dict[tuple[object, ...], _Attachment] = {}
        self._host = host_identity() if hasattr(os, "pidfd_open") else ""

    async def register(self, memory: KvStore) -> None:
        """Every store can be copied into as it is."""

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> ShmRegionServer:
        """Say where `memory` is; raises `LocalFault` where the system cannot share it."""
        if not isinstance(memory, KvMemory) or memory.fd is None or not self._host:
            raise LocalFault("KV lies in no memfd of this host: use the tcp transport")
        pid = os.getpid()
        address = {
            "host": self._host,
            "pid": str(pid),
            "fd": str(memory.fd),
            "start": start_time(pid),
        }
        return ShmRegionServer(
            RemoteRegion(
                transport=self.name,
                address=address,
                num_blocks=memory.num_blocks,
                block_bytes=memory.layout.block_bytes,
            )
        )

    def can_reach(self, region: RemoteRegion) -> bool:
        """Whether the region maps; the map is kept for the reads to come."""
        if region.transport != self.name or not self._host:
            return False
        try:
            self._attached(region)
        except TransferFailed:
            return False
        return True

    def _attached(self, region: RemoteRegion) -> _Attachment:
        if region.address.get("host") != self._host:
            raise TransferFailed("the peer is on another host")
        key = _key(region)
        attachment = self._attachments.get(key)
        if attachment is None:
            attachment = self._attachments[key] = _attach(region)
        if not attachment.is_alive:
            self._detach(key)
            raise TransferFailed("the peer's process is gone")
        return attachment

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        check_read(region, remote_blocks, memory, local_blocks)
        with self._attached(region) as peer:
            await memory.copy_in(peer.memory, list(block_runs(remote_blocks, local_blocks)))
            if not peer.is_alive:
                raise TransferFailed("the peer died while it was read")

    async def close_peer(self, region: RemoteRegion) -> None:
        self._detach(_key(region))

    async def close(self) -> None:
        for key in list(self._attachments):
            self._detach(key)

    def _detach(self, key: tuple[object, ...]) -> None:
        attachment = self._attachments.pop(key, None)
        if attachment is not None:
            attachment.leave()
