"""How rank 0 has all ranks of its worker read, or serve, the KV that each of them holds.

A worker of one process is one whose rank 0 leads nobody.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, replace

from kvtransfer.following import (
    BEGIN,
    CLOSE,
    MAY_READ,
    OPEN,
    READ,
    peer_fields,
    read_message,
)
from kvtransfer.parts import PartReader
from kvtransfer.paths import PLAIN_RULES, PathRules
from kvtransfer.reading import BlockRead, BlockReader, RankReader, RankReaders
from kvtransfer.transports.base import MayRead, Transport
from pdserve.domain.ids import BlockId, Epoch
from pdserve.domain.layout import ShardedLayout
from pdserve.domain.messages import HandoffHello, RemoteRegion
from pdserve.engine.kv_store import KvStore
from pdserve.engine.ranks.channel import RankChannel
from pdserve.engine.ranks.frames import Message
from pdserve.engine.ranks.ranked_kv import RankedKv, bytes_to_ints, own_store
from pdserve.engine.side_by_side import side_by_side

ANSWER_S = 30.0
"""A rank that has not answered what takes it no time is lost."""

OpenReader = Callable[[HandoffHello], Awaitable[BlockReader | None]]
"""Makes what reads this peer's blocks; None if no transport reaches it."""


class FollowerReader:
    """Has another rank read its part of the peer's blocks. Satisfies `RankReader`."""

    def __init__(
        self, channel: RankChannel, number: int, source: ShardedLayout, *, read_s: float
    ) -> None:
        self.num_blocks = 0
        self.block_bytes = 0
        self.num_ranks = source.num_ranks
        self.block_size = source.whole.block_size
        self._source = source
        self._channel = channel
        self._number = number
        self._read_s = read_s

    async def open(self, regions: Sequence[RemoteRegion]) -> bool:
        """Have the rank reach the peer; False if none of its transports does."""
        fields = {
            "reader": self._number,
            "regions": [asdict(region) for region in regions],
            **peer_fields(self._source),
        }
        answer = await self._channel.ask(OPEN, Message(fields), deadline_s=ANSWER_S)
        if not answer.fields["is_open"]:
            return False
        self.num_blocks = int(answer.fields["num_blocks"])
        self.block_bytes = int(answer.fields["block_bytes"])
        return True

    async def read(self, blocks: BlockRead) -> set[int]:
        question = read_message(self._number, blocks)
        answer = await self._channel.ask(READ, question, deadline_s=self._read_s)
        [places] = bytes_to_ints(answer.body, 1)
        return set(places)

    async def close(self) -> None:
        self._channel.tell(CLOSE, Message({"reader": self._number}))


class LeadingReader:
    """Has all ranks read at once, each into its own blocks. Satisfies `BlockReader`."""

    parts: PartReader | None = None

    def __init__(self, own: BlockReader, others: Sequence[FollowerReader]) -> None:
        self._ranks: list[RankReader] = [own, *others]
        self.num_blocks = min(rank.num_blocks for rank in self._ranks)
        self.num_ranks = own.num_ranks
        self.block_size = own.block_size
        self.block_bytes = sum(rank.block_bytes for rank in self._ranks)
        self.path = own.path

    async def read(self, blocks: BlockRead) -> set[int]:
        found = await side_by_side([rank.read(blocks) for rank in self._ranks])
        return set().union(*found)

    async def close(self) -> None:
        for rank in self._ranks:
            await rank.close()


@contextlib.asynccontextmanager
async def reading(
    kv: KvStore | RankedKv,
    layout: ShardedLayout,
    transports: Sequence[Transport],
    *,
    epoch: Epoch,
    read_s: float,
    rules: PathRules = PLAIN_RULES,
) -> AsyncIterator[OpenReader]:
    """Makes readers for a decode worker until the block ends; closes `transports` then.

    A read of another rank that takes longer than `read_s` means that the rank is lost.
    """
    memory, channels = own_store(kv), _channels(kv)
    async with contextlib.AsyncExitStack() as stack:
        for transport in transports:
            stack.push_async_callback(transport.close)
            await transport.register(memory)
        readers = RankReaders(memory, layout=layout, rank=0, transports=transports, rules=rules)
        stack.callback(readers.close)
        await _begin(channels, epoch)
        numbers = itertools.count()

        async def open_reader(peer: HandoffHello) -> BlockReader | None:
            source = peer.layout or layout
            own = readers.open(source, peer.regions)
            if own is None or not channels:
                return own
            number = next(numbers)
            others = [
                FollowerReader(channel, number, source, read_s=read_s) for channel in channels
            ]
            async with contextlib.AsyncExitStack() as undo:
                undo.push_async_callback(own.close)
                for each in others:
                    undo.push_async_callback(each.close)
                opened = await side_by_side([each.open(peer.regions) for each in others])
                if not all(opened):
                    return None
                undo.pop_all()
            return LeadingReader(own, others)

        yield open_reader


@contextlib.asynccontextmanager
async def serving(
    kv: KvStore | RankedKv,
    transports: Sequence[Transport],
    is_on_offer: Callable[[Sequence[BlockId]], bool],
    *,
    epoch: Epoch,
) -> AsyncIterator[list[RemoteRegion]]:
    """Lets peers read the blocks of a prefill worker, at each rank, until the block ends.

    `is_on_offer` is asked by all ranks. `transports` are closed at the end.
    """

    async def may_read(block_ids: Sequence[BlockId]) -> bool:
        return is_on_offer(block_ids)

    async with contextlib.AsyncExitStack() as stack:
        regions = []
        for transport in transports:
            stack.push_async_callback(transport.close)
            server = await transport.serve(own_store(kv), may_read)
            stack.push_async_callback(server.close)
            regions.append(server.region)
        channels = _channels(kv)
        for channel in channels:
            channel.handle(MAY_READ, _answer(may_read))
        for rank, answer in enumerate(await _begin(channels, epoch), start=1):
            for fields in answer.fields["regions"]:
                regions.append(replace(RemoteRegion(**fields), rank=rank))
        yield regions


def _answer(may_read: MayRead) -> Callable[[Message], Awaitable[Message]]:
    async def answer(message: Message) -> Message:
        [block_ids] = bytes_to_ints(message.body, 1)
        return Message({"may_read": await may_read([BlockId(block) for block in block_ids])})

    return answer


async def _begin(channels: Sequence[RankChannel], epoch: Epoch) -> list[Message]:
    message = Message({"epoch": epoch})
    return await side_by_side(
        [channel.ask(BEGIN, message, deadline_s=ANSWER_S) for channel in channels]
    )


def _channels(kv: KvStore | RankedKv) -> Sequence[RankChannel]:
    return kv.channels if isinstance(kv, RankedKv) else ()
