"""Reading blocks that a peer offers, whatever the ranks of both workers hold of them.

    a rank that holds what one of the peer's does     peer's block ─────────────▶ own block
    any other                         peer's blocks ──▶ staging ── heads, layers ──▶ own block

A block's digest is that of each of the peer's ranks, in rank order. A rank checks those of the
ranks that it read, where it read them to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvtransfer.parts import PartReader, part_reader
from kvtransfer.plan import Copy, Planes, copies_of, plan_shares
from kvtransfer.staging import Staging
from kvtransfer.transports import choose
from kvtransfer.transports.base import Transport
from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.layout import KvLayout, ShardedLayout
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.digest import DIGEST_BYTES
from pdserve.engine.kv_store import KvStore, block_runs
from pdserve.engine.side_by_side import side_by_side
from pdserve.engine.threads import run_to_end

_THREAD_ABOVE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRead:
    """Blocks to read, in lists of one length, which `places` count."""

    handoff: HandoffId
    indices: Sequence[int]  # in the prompt
    remote_blocks: Sequence[BlockId]
    local_blocks: Sequence[BlockId]
    digests: Sequence[bytes]  # those of the peer's ranks, joined

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, first: int, count: int) -> "BlockRead":
        part = slice(first, first + count)
        return BlockRead(
            handoff=self.handoff,
            indices=self.indices[part],
            remote_blocks=self.remote_blocks[part],
            local_blocks=self.local_blocks[part],
            digests=self.digests[part],
        )

    def corrupt_places(self, rank: int, digests: Sequence[bytes]) -> set[int]:
        """Where `digests`, made of what was read of the peer's `rank`, are not as was said."""
        own = slice(rank * DIGEST_BYTES, (rank + 1) * DIGEST_BYTES)
        both = enumerate(zip(self.digests, digests, strict=True))
        return {place for place, (said, found) in both if said[own] != found}


class BlockReader(Protocol):
    """Reads the blocks of one peer into those of this worker."""

    num_blocks: int  # of the peer: it offers blocks below this
    num_ranks: int  # of the peer: each gives a digest of each block
    block_bytes: int  # moved for each block, to all ranks together
    transport_name: str  # of rank 0, which stands for the others
    parts: PartReader | None  # reads before a block is whole; None: this reader cannot

    async def read(self, blocks: BlockRead) -> set[int]:
        """Read and check blocks; returns the places of those that are corrupt.

        The other local blocks hold what the peer's hold. Raises `TransferFailed` if the peer is
        gone, refuses, or is silent for too long. After the call, cancelled or not, nothing is
        written any more, at no rank.
        """
        ...

    async def close(self) -> None:
        """Forget the peer: its maps and connections. Reads that run fail."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One rank of the peer, and how it is reached."""

    rank: int
    layout: KvLayout
    transport: Transport
    region: RemoteRegion
    copies: Sequence[Copy] = ()  # of its blocks into ours


class DirectReader:
    """A rank whose blocks are those of one rank of the peer, byte by byte."""

    def __init__(self, memory: KvStore, source: Source, num_ranks: int) -> None:
        self.num_blocks = source.region.num_blocks
        self.num_ranks = num_ranks
        self.block_bytes = source.layout.block_bytes
        self.transport_name = source.transport.name
        self.parts = (
            part_reader(source.transport, source.region, memory) if num_ranks == 1 else None
        )
        self._memory = memory
        self._source = source

    async def read(self, blocks: BlockRead) -> set[int]:
        source, local_blocks = self._source, blocks.local_blocks
        await source.transport.read(source.region, blocks.remote_blocks, self._memory, local_blocks)
        digests = await self._memory.digests(blocks.handoff, blocks.indices, local_blocks)
        return blocks.corrupt_places(source.rank, digests)

    async def close(self) -> None:
        await self._source.transport.close_peer(self._source.region)


class ReshapingReader:
    """A rank that needs parts of the blocks of one or several ranks of the peer.

    Whole blocks are read into `staging`, so that their digests can be checked; then the wanted
    layers and heads are copied. If our blocks lie on a device, they are put together in `assembly`.
    """

    parts: PartReader | None = None  # of blocks that are whole alone there is a digest

    def __init__(
        self,
        memory: KvStore,
        sources: Sequence[Source],
        num_ranks: int,
        *,
        staging: Staging,
        assembly: Staging,
    ) -> None:
        self.num_blocks = min(source.region.num_blocks for source in sources)
        self.num_ranks = num_ranks
        self.block_bytes = sum(source.layout.block_bytes for source in sources)
        self.transport_name = sources[0].transport.name
        self._memory = memory
        self._sources = sources
        self._staging = staging
        self._assembly = assembly

    async def read(self, blocks: BlockRead) -> set[int]:
        if self._memory.host_blocks(()) is not None:
            return await self._gather(blocks, self._memory, blocks.local_blocks)
        corrupt: set[int] = set()
        async with self._assembly.lend(self._memory.layout) as whole:
            for first in range(0, len(blocks), whole.num_blocks):
                part = blocks.part(first, whole.num_blocks)
                places = [BlockId(place) for place in range(len(part))]
                found = await self._gather(part, whole, places)
                corrupt |= {first + place for place in found}
                runs = block_runs(places, part.local_blocks)
                await self._memory.copy_in(whole.bytes, list(runs))
        return corrupt

    async def _gather(
        self, blocks: BlockRead, target: KvStore, target_blocks: Sequence[BlockId]
    ) -> set[int]:
        """From all sources at once; each of them waits for staging of its own."""
        found = await side_by_side(
            [self._take(source, blocks, target, target_blocks) for source in self._sources]
        )
        return set().union(*found)

    async def _take(
        self,
        source: Source,
        blocks: BlockRead,
        target: KvStore,
        target_blocks: Sequence[BlockId],
    ) -> set[int]:
        corrupt: set[int] = set()
        async with self._staging.lend(source.layout) as stage:
            await source.transport.register(stage)
            for first in range(0, len(blocks), stage.num_blocks):
                part = blocks.part(first, stage.num_blocks)
                staged = [BlockId(place) for place in range(len(part))]
                await source.transport.read(source.region, part.remote_blocks, stage, staged)
                digests = await stage.digests(part.handoff, part.indices, staged)
                bad = part.corrupt_places(source.rank, digests)
                corrupt |= {first + place for place in bad}
                good = [place for place in staged if place not in bad]
                into = [target_blocks[first + place] for place in good]
                await _copy_blocks(source.copies, stage, good, target, into)
        return corrupt

    async def close(self) -> None:
        for source in self._sources:
            await source.transport.close_peer(source.region)


async def _copy_blocks(
    copies: Sequence[Copy],
    source: KvStore,
    source_blocks: Sequence[BlockId],
    target: KvStore,
    target_blocks: Sequence[BlockId],
) -> None:
    """Between memories of the host, off the event loop unless it is little."""
    of, to = source.host_blocks(source_blocks) or [], target.host_blocks(target_blocks) or []

    def copy(is_cancelled: Callable[[], bool]) -> None:
        for each, into in zip(of, to, strict=True):
            if is_cancelled():
                return
            copy_planes(copies, each, into)

    try:
        num_bytes = sum(copy.num_planes * copy.num_rows * copy.row_bytes for copy in copies)
        if num_bytes * len(of) <= _THREAD_ABOVE_BYTES:
            copy(lambda: False)
        else:
            await run_to_end(copy)
    finally:
        for view in (*of, *to):  # else a failure's traceback keeps the memory from being closed
            view.release()


def copy_planes(copies: Sequence[Copy], source: memoryview, target: memoryview) -> None:
    """Do the copies from one source block to one target block."""
    for copy in copies:
        _planes(copy, copy.target, target)[...] = _planes(copy, copy.source, source)


def _planes(copy: Copy, planes: Planes, block: memoryview) -> npt.NDArray[np.uint8]:
    return np.ndarray(
        (copy.num_planes, copy.num_rows, copy.row_bytes),
        np.uint8,
        buffer=block,
        offset=planes.offset,
        strides=(planes.plane_step, planes.row_step, 1),
    )


class RankReaders:
    """Makes the readers of one rank, which read into `memory`, and owns their staging.

    The transports stay their owner's. Close this once no reader reads any more.
    """

    def __init__(
        self,
        memory: KvStore,
        *,
        layout: ShardedLayout,
        rank: int,
        transports: Sequence[Transport],
    ) -> None:
        self._memory = memory
        self._layout = layout
        self._rank = rank
        self._transports = transports
        self._staging, self._assembly = Staging(), Staging()

    def open(self, source: ShardedLayout, regions: Sequence[RemoteRegion]) -> BlockReader | None:
        """For a peer whose KV is divided as `source`; None if no transport reaches some rank."""
        mine = self._layout.rank(self._rank)
        sources = []
        for share in plan_shares(source, self._layout, self._rank):
            theirs = source.rank(share.rank)
            own = [region for region in regions if region.rank == share.rank]
            if (chosen := choose(self._transports, own)) is None:
                return None
            transport, region = chosen
            sources.append(
                Source(
                    rank=share.rank,
                    layout=theirs.layout,
                    transport=transport,
                    region=region,
                    copies=copies_of(share, theirs, mine),
                )
            )
        if len(sources) == 1 and source.rank(sources[0].rank) == mine:
            return DirectReader(self._memory, sources[0], source.num_ranks)
        return ReshapingReader(
            self._memory,
            sources,
            source.num_ranks,
            staging=self._staging,
            assembly=self._assembly,
        )

    def close(self) -> None:
        self._staging.close()
        self._assembly.close()
