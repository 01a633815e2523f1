"""Blocks that are read part by part while their later layers are being computed."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from kvtransfer.landing import Landing
from kvtransfer.parts import PartReader, part_reader
from kvtransfer.paths import PLAIN_RULES, open_path
from kvtransfer.reading import RankReaders
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.sender import HandoffSender
from kvtransfer.session import Event, Phase, ProtocolViolation
from kvtransfer.transports import open_transports
from kvtransfer.transports.base import Transport
from kvtransfer.transports.divided import ReadsParts
from kvtransfer.transports.faulty import FaultyTransport
from kvtransfer.transports.memory import MemoryTransport
from pdserve.config.timers import Timers
from pdserve.domain.errors import ReadRefused, Reason, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.layout import BlockOrder, KvLayout, LayerKv, ShardedLayout
from pdserve.domain.messages import (
    BlocksForming,
    BlocksOffered,
    BlocksPulled,
    PrefillDone,
    RemoteRegion,
)
from pdserve.domain.tokens import SampledToken
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore
from tests.support.kv_handoff import (
    BLOCK_SIZE,
    DirectTransport,
    anyone,
    blocks,
    handoff_id,
    kv_memory,
    only,
    reader_of,
    start_of,
)

SEED = 12
NUM_LAYERS = 8
LAYOUT = KvLayout(
    layers=(LayerKv(1, 2, 2),) * NUM_LAYERS, block_size=BLOCK_SIZE, dtype="uint8", item_bytes=1
)
NUM_PARTS = 4
PART_BYTES = LAYOUT.block_bytes // NUM_PARTS
REMOTE, LOCAL = blocks(7, 3, 5), blocks(2, 9, 4)
FIRST = 10


@contextmanager
def memories() -> Iterator[tuple[KvMemory, KvMemory]]:
    """One of random bytes, and one of zeros."""
    source, target = KvMemory(LAYOUT, 16), KvMemory(LAYOUT, 16)
    source.bytes[:] = Random(SEED).randbytes(source.num_bytes)
    try:
        yield source, target
    finally:
        source.close()
        target.close()


class DamagesParts(FaultyTransport, ReadsParts):
    pass


class Breaks(MemoryTransport):
    """After `num_reads`."""

    def __init__(self, num_reads: int) -> None:
        super().__init__()
        self._num_left = num_reads

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        if self._num_left == 0:
            raise TransferFailed("broken")
        self._num_left -= 1
        await super().read(region, remote_blocks, memory, local_blocks)


class NextMemory(MemoryTransport):
    name = "next"


class Handoff:
    """The last three blocks of a prompt, of which block 0 of the three is known whole before."""

    def __init__(self, source: KvMemory, target: KvMemory, transport: MemoryTransport) -> None:
        self.source, self.target, self.transport = source, target, transport

    async def receiver(self, *others: Transport, corrupt: int = 0) -> HandoffReceiver:
        """`others` take over if the first transport fails."""
        first = DamagesParts(self.transport, corrupt) if corrupt else self.transport
        transports = [first, *others]
        regions = [(await each.serve(self.source, anyone)).region for each in transports]
        layout = ShardedLayout(whole=self.target.layout)
        readers = RankReaders(self.target, layout=layout, rank=0, transports=transports)
        reader = readers.open(layout, regions)
        assert reader is not None
        return HandoffReceiver(
            handoff_id(),
            reader=reader,
            landing=Landing(blocks=LOCAL, first_block=FIRST, block_size=BLOCK_SIZE),
            num_tokens=(FIRST + len(LOCAL)) * BLOCK_SIZE,
            vocab_size=100,
            on_first_token=lambda done: True,
        )

    def offer(self, start: int, end: int) -> BlocksOffered:
        indices = range(FIRST + start, FIRST + end)
        both = zip(indices, REMOTE[start:end], strict=True)
        return BlocksOffered(
            handoff=handoff_id(),
            first_block=indices.start,
            block_ids=REMOTE[start:end],
            digests=tuple(
                block_digest(handoff_id(), index, self.source.block(block)) for index, block in both
            ),
        )

    def part(self, block: BlockId, part: int) -> bytes:
        return bytes(self.target.block(block)[part * PART_BYTES : (part + 1) * PART_BYTES])

    def is_there(self, place: int) -> bool:
        return self.target.block(LOCAL[place]) == self.source.block(REMOTE[place])


@pytest.fixture
def handoff() -> Iterator[Handoff]:
    with memories() as (source, target):
        yield Handoff(source, target, MemoryTransport())


def forming(num_ready_parts: int, start: int = 1) -> BlocksForming:
    return BlocksForming(
        handoff=handoff_id(),
        first_block=FIRST + start,
        block_ids=REMOTE[start:],
        num_ready_parts=num_ready_parts,
    )


@pytest.mark.parametrize(
    ("num_layers", "num_parts"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 4), (26, 13), (61, 61)],
)
def test_a_block_has_at_least_four_parts_if_its_layers_allow_it(
    num_layers: int, num_parts: int
) -> None:
    layout = replace(LAYOUT, layers=(LayerKv(1, 2, 2),) * num_layers)
    assert layout.num_parts == num_parts
    assert layout.part(num_parts).block_bytes * num_parts == layout.block_bytes


def test_blocks_of_layers_that_differ_or_are_not_aligned_have_no_parts() -> None:
    differ = replace(LAYOUT, layers=(LayerKv(1, 2, 2), LayerKv(2, 2, 2)))
    odd = replace(LAYOUT, layers=(LayerKv(1, 1, 0),) * 4)  # of 4 bytes
    assert (differ.num_parts, odd.num_parts) == (1, 1)


@pytest.mark.parametrize("name", ["shm", "tcp", "memory"])
async def test_listed_parts_arrive_exactly_and_nothing_else_changes(name: str) -> None:
    random = Random(SEED)
    timers = Timers()
    serving, reading = (
        [MemoryTransport()] * 2
        if name == "memory"
        else (
            *open_transports([name], "127.0.0.1", timers=timers),
            *open_transports([name], "127.0.0.1", timers=timers),
        )
    )
    with memories() as (source, target):
        server = await serving.serve(source, only(REMOTE))
        before = bytearray(target.bytes)
        path = open_path([reading], [server.region], PLAIN_RULES)
        assert path is not None
        reader = part_reader(path, target)
        assert reader is not None
        for _ in range(5):
            first, end = sorted(random.sample(range(NUM_PARTS + 1), 2))
            assert await reader.read(REMOTE, LOCAL, range(first, end))
            for remote, local in zip(REMOTE, LOCAL, strict=True):
                of, to = remote * LAYOUT.block_bytes, local * LAYOUT.block_bytes
                low, high = first * PART_BYTES, end * PART_BYTES
                before[to + low : to + high] = source.bytes[of + low : of + high]
            assert target.bytes == before, SEED
        if server.sees_reads:  # parts of a block that is not on offer
            with pytest.raises(ReadRefused):
                await reader.read(blocks(1), LOCAL[:1], range(1))
        assert target.bytes == before
        await reading.close_peer(server.region)
        await server.close()
    for transport in (serving, reading):
        await transport.close()


async def test_a_transport_that_reads_whole_blocks_only_is_not_asked_for_parts() -> None:
    with memories() as (source, target), kv_memory(16) as one_layer:
        transport = MemoryTransport()
        region = (await transport.serve(source, anyone)).region
        assert isinstance(reader_of(transport, region, target).parts, PartReader)
        assert reader_of(FaultyTransport(transport, 1), region, target).parts is None
        assert reader_of(transport, region, one_layer).parts is None


@pytest.mark.parametrize("side", [{"block_size": 2 * BLOCK_SIZE}, {"order": BlockOrder.HEADS}])
async def test_parts_are_read_only_of_blocks_that_are_as_ours(side: dict[str, Any]) -> None:
    ours, theirs = ShardedLayout(whole=LAYOUT), ShardedLayout(whole=replace(LAYOUT, **side))
    with memories() as (_, target):
        transport = MemoryTransport()
        source = KvMemory(theirs.whole, 8)
        region = (await transport.serve(source, anyone)).region
        readers = RankReaders(target, layout=ours, rank=0, transports=[transport])
        reader = readers.open(theirs, [region])
        assert reader is not None
        assert reader.parts is None
        readers.close()
        source.close()


@pytest.mark.parametrize("num_reads", [0, 1, 2])
@pytest.mark.parametrize("takes_parts", [True, False])
async def test_when_the_transport_fails_the_next_reads_what_is_missing_or_whole_blocks(
    num_reads: int, takes_parts: bool
) -> None:
    with memories() as (source, target):
        handoff = Handoff(source, target, Breaks(num_reads))
        next_one = NextMemory() if takes_parts else DirectTransport()
        receiver = await handoff.receiver(next_one)
        assert receiver.reads_parts
        for num_parts in (1, 3):
            receiver.hear(forming(num_parts))
            assert await receiver.land() is None
        receiver.hear(handoff.offer(0, 3))
        assert await receiver.land() is not None
        assert receiver.is_complete
        assert all(map(handoff.is_there, range(3)))
        read_twice = 0 if takes_parts else (0, 1, 3)[num_reads] * 2 * PART_BYTES
        assert receiver.moved.retried_bytes == read_twice
        assert receiver.num_bytes == 3 * LAYOUT.block_bytes + read_twice
        assert receiver.num_corrupt_blocks == 0
        receiver.end()


async def test_the_rest_of_blocks_read_in_part_comes_by_the_next_transport_whole() -> None:
    """What failed is the last read, of the parts that an offer completes."""
    with memories() as (source, target):
        handoff = Handoff(source, target, Breaks(2))
        receiver = await handoff.receiver(DirectTransport())
        receiver.hear(forming(3))
        assert await receiver.land() is None
        receiver.hear(handoff.offer(0, 1))
        assert await receiver.land() is not None
        receiver.hear(handoff.offer(1, 3))
        assert await receiver.land() is not None
        assert all(map(handoff.is_there, range(3)))
        assert receiver.moved.retried_bytes == 2 * 3 * PART_BYTES
        receiver.end()


async def test_parts_that_the_only_transport_cannot_read_end_the_handoff() -> None:
    with memories() as (source, target):
        receiver = await Handoff(source, target, Breaks(0)).receiver()
        receiver.hear(forming(1))
        with pytest.raises(TransferFailed, match="broken"):
            await receiver.land()
        receiver.end()


async def test_parts_are_read_early_and_count_once_the_block_is_checked(handoff: Handoff) -> None:
    receiver = await handoff.receiver()
    receiver.hear(handoff.offer(0, 1))
    assert isinstance(await receiver.land(), BlocksPulled)
    assert receiver.hear(forming(1))
    assert receiver.hear(forming(3))  # said again before the first was read
    assert await receiver.wait_offer()
    assert await receiver.land() is None
    assert receiver.num_landed_blocks == 1
    for place in (1, 2):
        local, remote = LOCAL[place], REMOTE[place]
        assert (
            handoff.target.block(local)[: 3 * PART_BYTES]
            == (handoff.source.block(remote)[: 3 * PART_BYTES])
        )
        assert handoff.part(local, 3) == bytes(PART_BYTES)
    receiver.hear(handoff.offer(1, 3))
    pulled = await receiver.land()
    assert pulled is not None
    assert (pulled.first_block, pulled.num_blocks) == (FIRST + 1, 2)
    assert receiver.is_complete
    assert all(map(handoff.is_there, range(3)))
    assert receiver.num_bytes == 3 * LAYOUT.block_bytes  # each byte once
    assert receiver.end() is not None


async def test_an_offer_may_hold_whole_blocks_and_those_read_in_part(handoff: Handoff) -> None:
    receiver = await handoff.receiver()
    receiver.hear(forming(NUM_PARTS))
    assert await receiver.land() is None
    receiver.hear(handoff.offer(0, 3))
    assert await receiver.land() is not None
    assert all(map(handoff.is_there, range(3)))
    assert receiver.num_bytes == 3 * LAYOUT.block_bytes
    receiver.end()


async def test_parts_that_were_computed_anew_are_read_anew(handoff: Handoff) -> None:
    """A step that failed is run again, and may give other low bits."""
    receiver = await handoff.receiver()
    receiver.hear(handoff.offer(0, 1))
    await receiver.land()
    receiver.hear(forming(2))
    await receiver.land()
    handoff.source.block(REMOTE[2])[0] ^= 1
    receiver.hear(handoff.offer(1, 3))
    assert await receiver.land() is not None
    assert all(map(handoff.is_there, range(3)))
    assert receiver.num_corrupt_blocks == 1
    receiver.end()


async def test_a_part_that_is_damaged_on_the_way_is_found_by_the_digest(handoff: Handoff) -> None:
    receiver = await handoff.receiver(corrupt=1)
    receiver.hear(forming(1))
    await receiver.land()
    receiver.hear(handoff.offer(0, 3))
    assert await receiver.land() is not None
    assert receiver.num_corrupt_blocks == 1
    assert all(map(handoff.is_there, range(3)))
    receiver.end()


async def test_a_block_that_never_matches_fails_though_its_parts_were_read(
    handoff: Handoff,
) -> None:
    receiver = await handoff.receiver()
    receiver.hear(forming(NUM_PARTS))
    await receiver.land()
    offer = handoff.offer(0, 3)
    receiver.hear(replace(offer, digests=(*offer.digests[:2], bytes(16))))
    with pytest.raises(TransferFailed) as failed:
        await receiver.land()
    assert failed.value.reason is Reason.KV_INTEGRITY
    assert receiver.num_landed_blocks == 0
    receiver.end()


async def test_announced_parts_are_not_read_once_their_blocks_have_landed(
    handoff: Handoff,
) -> None:
    """They may be another's by then."""
    receiver = await handoff.receiver()
    receiver.hear(forming(3))
    receiver.hear(handoff.offer(0, 3))
    assert await receiver.land() is not None
    waiting = asyncio.create_task(receiver.wait_offer())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    token = SampledToken(1)
    receiver.hear(
        PrefillDone(
            handoff=handoff_id(), first_token=token, queue_s=0.0, prefill_s=0.0, cached_tokens=0
        )
    )
    assert not await waiting
    receiver.end()


async def test_what_is_forming_after_its_offer_or_again_is_late(handoff: Handoff) -> None:
    receiver = await handoff.receiver()
    assert receiver.hear(forming(2))
    assert not receiver.hear(forming(2))
    assert not receiver.hear(forming(1))
    receiver.hear(handoff.offer(0, 3))
    assert not receiver.hear(forming(3))
    receiver.end()
    assert not receiver.hear(forming(4))


@pytest.mark.parametrize(
    "lie",
    [
        replace(forming(1), first_block=FIRST - 1),
        replace(forming(1), block_ids=REMOTE[1:2]),
        replace(forming(1), block_ids=()),
        replace(forming(1), block_ids=blocks(1, 16)),
        forming(0),
        forming(NUM_PARTS + 1),
    ],
)
async def test_nonsense_about_what_is_forming_is_a_violation(
    handoff: Handoff, lie: BlocksForming
) -> None:
    receiver = await handoff.receiver()
    with pytest.raises(ProtocolViolation):
        receiver.hear(lie)
    receiver.hear(forming(1))
    with pytest.raises(ProtocolViolation):
        receiver.hear(forming(2, start=2))
    assert receiver.phase is Phase.ASKED
    receiver.end()


async def test_parts_that_nobody_asked_for_are_a_violation() -> None:
    with kv_memory(16, seed=1) as source, kv_memory(16) as target:
        receiver = await Handoff(source, target, MemoryTransport()).receiver()
        with pytest.raises(ProtocolViolation):
            receiver.hear(forming(1))
        receiver.end()


async def test_forming_blocks_are_pinned_and_readable_until_the_pull() -> None:
    pool = BlockPool(16)
    table = pool.reserve(4)
    assert table is not None
    table.hold(0, 4)
    with memories() as (source, _):
        start = replace(start_of(14), reads_parts=True)
        sender = HandoffSender(
            start,
            block_table=table,
            memory=source,
            block_size=BLOCK_SIZE,
            lease_s=10.0,
            now_s=0.0,
        )
        await sender.offer(9, is_last=False)
        for num_ready_parts in (1, 3):
            message = sender.form(9, num_ready_parts)
            assert message is not None
            assert (message.first_block, message.num_ready_parts) == (2, num_ready_parts)
            assert message.block_ids == tuple(table.block_ids[2:])
        assert pool.usage().pinned == 4
        assert not sender.not_offered(set(table.block_ids))
        offer = await sender.offer(14, is_last=True)
        assert offer is not None
        assert sender.form(9, 4) is None  # it is offered
        assert pool.usage().pinned == 4
        sender.pulled(BlocksPulled(handoff=start.handoff, first_block=0, num_blocks=4))
        assert pool.usage().pinned == 0
        sender.end(Event.END)
        assert sender.form(9, 4) is None
    assert pool.usage().is_idle


@pytest.mark.parametrize("cause", [Event.END, Event.FAIL, Event.LOSE, Event.EXPIRE])
def test_every_ending_gives_back_forming_blocks(cause: Event) -> None:
    pool = BlockPool(16)
    table = pool.reserve(4)
    assert table is not None
    table.hold(0, 4)
    with memories() as (source, _):
        sender = HandoffSender(
            replace(start_of(14, 3), reads_parts=True),
            block_table=table,
            memory=source,
            block_size=BLOCK_SIZE,
            lease_s=10.0,
            now_s=0.0,
        )
        message = sender.form(4, 1)
        assert message is not None
        assert message.first_block == 3  # what the peer has is not told of
        assert pool.usage().pinned == 1
        sender.end(cause)
    assert pool.usage().is_idle


def test_a_peer_that_reads_whole_blocks_hears_nothing_of_parts() -> None:
    pool = BlockPool(16)
    table = pool.reserve(4)
    assert table is not None
    table.hold(0, 4)
    with memories() as (source, _):
        sender = HandoffSender(
            start_of(14),
            block_table=table,
            memory=source,
            block_size=BLOCK_SIZE,
            lease_s=10.0,
            now_s=0.0,
        )
        assert sender.form(9, 1) is None
        assert pool.usage().pinned == 0
        sender.end(Event.END)
