"""What every transport does: let peers read a region, and read a peer's."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.domain.errors import TransferFailed
from pdserve.domain.ids import BlockId, Epoch
from pdserve.domain.invariants import check_invariant
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import KvStore

MayRead = Callable[[Sequence[BlockId]], Awaitable[bool]]
"""Asked by a serving transport that sees each read: are all these blocks on offer?

Only rank 0 of a worker knows; the others wait for its answer.
"""


@dataclass(frozen=True, slots=True)
class End:
    """Who reads or is read: one rank of one life of a worker."""

    epoch: Epoch
    rank: int = 0


NOBODY = End(Epoch(0))
"""Reads for no worker: a tool."""


@dataclass(frozen=True, slots=True)
class ReadEvent:
    """A read that was allowed begins, or is over: nothing reads the blocks for it any more."""

    reader: End
    block_ids: tuple[BlockId, ...]
    is_over: bool


OnRead = Callable[[ReadEvent], None]


def ignore(event: ReadEvent) -> None:
    """For a serving side that need not know."""


class RegionServer(Protocol):
    """The side whose memory is read. Peers never write into it."""

    region: RemoteRegion
    sees_reads: bool  # else it neither asks `may_read` nor tells of reads

    async def close(self) -> None: ...


class Transport(Protocol):
    """The side that reads, into blocks that it has reserved itself."""

    name: str

    async def register(self, memory: KvStore) -> None:
        """To be called before the first read into `memory`; harmless when called again."""
        ...

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> RegionServer:
        """Let peers read `memory` until the returned server is closed; registers it if need be."""
        ...

    def can_reach(self, region: RemoteRegion) -> bool:
        """Whether this process can read that region, by what its address says."""
        ...

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        """Copy each remote block over the local block of the same place in the list.

        Raises `TransferFailed` if the peer is gone or is silent for too long, `ReadRefused` if it
        refuses. After a cancelled call nothing is written any more.
        """
        ...

    async def close_peer(self, region: RemoteRegion) -> None:
        """Forget a peer: its maps and connections."""
        ...

    async def close(self) -> None: ...


def check_read(
    region: RemoteRegion,
    remote_blocks: Sequence[BlockId],
    memory: KvStore,
    local_blocks: Sequence[BlockId],
) -> None:
    """Raises `TransferFailed` if the peer's side makes no sense; ours is an invariant."""
    num_remote, num_local = len(remote_blocks), len(local_blocks)
    check_invariant(num_remote == num_local, "blocks come in pairs", num_remote, num_local)
    are_ours = not local_blocks or 0 <= min(local_blocks) <= max(local_blocks) < memory.num_blocks
    check_invariant(are_ours, "blocks land in our memory", local_blocks, memory.num_blocks)
    if region.block_bytes != memory.layout.block_bytes:
        raise TransferFailed(
            f"the peer's blocks have {region.block_bytes} bytes, ours {memory.layout.block_bytes}"
        )
    if remote_blocks and not 0 <= min(remote_blocks) <= max(remote_blocks) < region.num_blocks:
        raise TransferFailed(f"a block beyond the peer's {region.num_blocks} asked for")
