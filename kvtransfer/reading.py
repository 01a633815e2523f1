"""Reading blocks that a peer offers, whatever the ranks of both workers hold of them.

    a rank whose blocks are those of one of the peer's     peer's block ──────────▶ own block
    any other               peer's blocks ──▶ staging ── heads, layers, tokens ──▶ own blocks

A block's digest is that of each of the peer's ranks, in rank order. A rank checks those of the
ranks that it read, where it read them to.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvtransfer.landing import Landing, Rows
from kvtransfer.parts import PartReader, part_reader
from kvtransfer.paths import PLAIN_RULES, Path, PathRules, open_path
from kvtransfer.plan import Copy, Planes, copies_of, plan_shares
from kvtransfer.staging import Staging
from kvtransfer.transports.base import Transport
from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.layout import KvLayout, ShardedLayout
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.digest import DIGEST_BYTES
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore, block_runs
from pdserve.engine.side_by_side import side_by_side
from pdserve.engine.threads import run_to_end

_THREAD_ABOVE_BYTES = 1 << 20

OwnBlocks = Sequence[BlockId] | Mapping[int, BlockId]
"""By their places in a `Landing`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRead:
    """Blocks of a peer to read, in lists of one length, which `places` count; and where to."""

    handoff: HandoffId
    block_size: int  # of the peer's blocks
    indices: Sequence[int]  # in the prompt, counted in the peer's blocks
    remote_blocks: Sequence[BlockId]
    digests: Sequence[bytes]  # those of the peer's ranks, joined
    landing: Landing

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, first: int, count: int) -> "BlockRead":
        part = slice(first, first + count)
        return replace(
            self,
            indices=self.indices[part],
            remote_blocks=self.remote_blocks[part],
            digests=self.digests[part],
        )

    def rows(self, place: int) -> list[Rows]:
        return list(self.landing.rows_of(self.indices[place], self.block_size))

    def own_blocks(self) -> list[BlockId]:
        """Those of ours that take one of the peer's each; their blocks are of one size."""
        first = self.landing.first_block
        return [self.landing.blocks[index - first] for index in self.indices]

    def corrupt_places(self, rank: int, digests: Sequence[bytes]) -> set[int]:
        """Where `digests`, made of what was read of the peer's `rank`, are not as was said."""
        own = slice(rank * DIGEST_BYTES, (rank + 1) * DIGEST_BYTES)
        both = enumerate(zip(self.digests, digests, strict=True))
        return {place for place, (said, found) in both if said[own] != found}


class RankReader(Protocol):
    """Reads the blocks of one peer into those of one rank of this worker, or of all."""

    num_blocks: int  # of the peer: it offers blocks below this
    num_ranks: int  # of the peer: each gives a digest of each block
    block_size: int  # of the peer: tokens in a block
    block_bytes: int  # moved for each block, to all ranks together

    async def read(self, blocks: BlockRead) -> set[int]:
        """Read and check blocks; returns the places of those that are corrupt.

        The tokens of the others are in our blocks as they are in the peer's. Raises
        `TransferFailed` if the peer is gone, refuses, or is silent for too long. After the call,
        cancelled or not, nothing is written any more, at no rank.
        """
        ...

    async def close(self) -> None:
        """Forget the peer: its maps and connections. Reads that run fail."""
        ...


class BlockReader(RankReader, Protocol):
    path: Path  # to the first rank that is read, which stands for the others

    @property
    def parts(self) -> PartReader | None:
        """What reads before a block is whole; None if nothing does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One rank of the peer, and how it is reached."""

    rank: int
    layout: KvLayout
    path: Path
    copies: Sequence[Copy] = ()  # of its blocks into ours


class DirectReader:
    """A rank whose blocks are those of one rank of the peer, byte by byte."""

    def __init__(self, memory: KvStore, source: Source, num_ranks: int) -> None:
        self.num_blocks = source.path.num_blocks
        self.num_ranks = num_ranks
        self.block_size = source.layout.block_size
        self.block_bytes = source.layout.block_bytes
        self.path = source.path
        self._parts = part_reader(source.path, memory) if num_ranks == 1 else None
        self._memory = memory
        self._source = source

    @property
    def parts(self) -> PartReader | None:
        return self._parts if self.path.reads_parts else None

    async def read(self, blocks: BlockRead) -> set[int]:
        source, local_blocks = self._source, blocks.own_blocks()
        await source.path.read(blocks.remote_blocks, self._memory, local_blocks)
        digests = await self._memory.digests(blocks.handoff, blocks.indices, local_blocks)
        return blocks.corrupt_places(source.rank, digests)

    async def close(self) -> None:
        await self._source.path.close()


class ReshapingReader:
    """A rank that needs parts of the blocks of one or several ranks of the peer.

    Whole blocks are read into `staging`, so that their digests can be checked; then the wanted
    layers, heads and tokens are copied. If our blocks lie on a device, they are put together in
    `assembly`.
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
        self.num_blocks = min(source.path.num_blocks for source in sources)
        self.num_ranks = num_ranks
        self.block_size = sources[0].layout.block_size
        self.block_bytes = sum(source.layout.block_bytes for source in sources)
        self.path = sources[0].path
        self._memory = memory
        self._sources = sources
        self._staging = staging
        self._assembly = assembly

    async def read(self, blocks: BlockRead) -> set[int]:
        if self._memory.host_blocks(()) is not None:
            return await self._gather(blocks, self._memory, blocks.landing.blocks)
        corrupt: set[int] = set()
        size = self._memory.layout.block_size
        room = num_blocks_for(blocks.block_size, size) + 1  # those that one of the peer's reaches
        async with self._assembly.lend(self._memory.layout, room) as whole:
            for first, count in _parts(blocks, whole.num_blocks):
                part = blocks.part(first, count)
                found = await self._assemble(part, whole)
                corrupt |= {first + place for place in found}
        return corrupt

    async def _assemble(self, part: BlockRead, whole: KvMemory) -> set[int]:
        """In `whole`, which has room for all of our blocks that the part reaches.

        What the part does not fill of a block may have landed before, and is brought there first.
        """
        num_tokens = _reached(part, range(len(part)))
        places = {place: BlockId(number) for number, place in enumerate(num_tokens)}
        ours = [part.landing.blocks[place] for place in num_tokens]
        size = self._memory.layout.block_size
        kept = [place for place, count in num_tokens.items() if count < size]
        into = [places[place] for place in kept]
        own = [part.landing.blocks[place] for place in kept]
        if kept:
            await self._memory.copy_out(whole.bytes, list(block_runs(into, own)))
        found = await self._gather(part, whole, places)
        await self._memory.copy_in(whole.bytes, list(block_runs(list(places.values()), ours)))
        return found

    async def _gather(self, blocks: BlockRead, target: KvStore, own: OwnBlocks) -> set[int]:
        """From all sources at once; each of them waits for staging of its own."""
        found = await side_by_side(
            [self._take(source, blocks, target, own) for source in self._sources]
        )
        return set().union(*found)

    async def _take(
        self, source: Source, blocks: BlockRead, target: KvStore, own: OwnBlocks
    ) -> set[int]:
        corrupt: set[int] = set()
        async with self._staging.lend(source.layout) as stage:
            for first in range(0, len(blocks), stage.num_blocks):
                part = blocks.part(first, stage.num_blocks)
                staged = [BlockId(place) for place in range(len(part))]
                await source.path.read(part.remote_blocks, stage, staged)
                digests = await stage.digests(part.handoff, part.indices, staged)
                bad = part.corrupt_places(source.rank, digests)
                corrupt |= {first + place for place in bad}
                moves = [
                    Move(source=block, target=own[rows.place], rows=rows)
                    for place, block in enumerate(staged)
                    if place not in bad
                    for rows in part.rows(place)
                ]
                await _move(source.copies, moves, stage, target)
        return corrupt

    async def close(self) -> None:
        for source in self._sources:
            await source.path.close()


def _reached(blocks: BlockRead, places: Iterable[int]) -> dict[int, int]:
    """Of our blocks, by place: how many tokens of the peer's blocks at `places` go into each."""
    num_tokens: dict[int, int] = defaultdict(int)
    for place in places:
        for rows in blocks.rows(place):
            num_tokens[rows.place] += rows.count
    return num_tokens


def _parts(blocks: BlockRead, num_blocks: int) -> Iterator[tuple[int, int]]:
    """The first place and the number of places of parts that reach at most `num_blocks` of ours."""
    first, reached = 0, set[int]()
    for place in range(len(blocks)):
        own = {rows.place for rows in blocks.rows(place)}
        if len(reached | own) > num_blocks:
            yield first, place - first
            first, reached = place, set()
        reached |= own
    yield first, len(blocks) - first


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Tokens of a source block that go to a target block."""

    source: BlockId
    target: BlockId
    rows: Rows


async def _move(
    copies: Sequence[Copy], moves: Sequence[Move], source: KvStore, target: KvStore
) -> None:
    """Between memories of the host, off the event loop unless it is little."""
    of = source.host_blocks([move.source for move in moves]) or []
    to = target.host_blocks([move.target for move in moves]) or []

    def copy(is_cancelled: Callable[[], bool]) -> None:
        for move, each, into in zip(moves, of, to, strict=True):
            if is_cancelled():
                return
            copy_planes(copies, each, into, move.rows)

    try:
        token_bytes = sum(copy.token_bytes for copy in copies)
        if token_bytes * sum(move.rows.count for move in moves) <= _THREAD_ABOVE_BYTES:
            copy(lambda: False)
        else:
            await run_to_end(copy)
    finally:
        for view in (*of, *to):  # else a failure's traceback keeps the memory from being closed
            view.release()


def copy_planes(copies: Sequence[Copy], source: memoryview, target: memoryview, rows: Rows) -> None:
    """Do the copies from one source block to one target block, for these tokens."""
    for copy in copies:
        into = _planes(copy, copy.target, target, rows.target, rows.count)
        into[...] = _planes(copy, copy.source, source, rows.source, rows.count)


def _planes(
    copy: Copy, planes: Planes, block: memoryview, first_row: int, num_rows: int
) -> npt.NDArray[np.uint8]:
    return np.ndarray(
        (copy.num_planes, num_rows, copy.num_heads, copy.head_bytes),
        np.uint8,
        buffer=block,
        offset=planes.offset + first_row * planes.token_step,
        strides=(planes.plane_step, planes.token_step, planes.head_step, 1),
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
        rules: PathRules = PLAIN_RULES,
    ) -> None:
        self._memory = memory
        self._rules = rules
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
            if (path := open_path(self._transports, own, self._rules)) is None:
                return None
            sources.append(
                Source(
                    rank=share.rank,
                    layout=theirs.layout,
                    path=path,
                    copies=copies_of(share, theirs, mine),
                )
            )
        if len(sources) == 1 and source.rank(sources[0].rank) == mine:  # in order and size, too
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
