"""What transport `collective` promises beyond what all do: groups, slots, strangers."""

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest

from kvtransfer.transports.base import End, MayRead, OnRead, ReadEvent, ignore
from kvtransfer.transports.collective import CollectiveTransport
from kvtransfer.transports.collective_control import Control
from kvtransfer.transports.collective_frames import (
    Ending,
    Frame,
    Kind,
    decode_hello,
    encode,
    encode_end,
    encode_hello,
    encode_key,
    encode_piece,
    encode_read,
)
from kvtransfer.transports.collective_groups import NUM_SLOTS, GlooPair
from kvtransfer.transports.collective_lane import Lane, LaneLimits, blocks_per_piece
from kvtransfer.transports.collective_server import CollectiveRegionServer
from pdserve.domain.errors import TransferFailed
from pdserve.domain.ids import BlockId, Epoch
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import block_runs
from tests.support.kv_handoff import anyone, blocks, kv_memory
from tests.support.kv_peer import KvPeer, start_fork_server
from tests.support.waiting import wait_until

SEED = 11
END = End(Epoch(5), 2)
NUM_BLOCKS, BLOCK_BYTES = 48, 1 << 20  # four blocks a piece
IDLE_S = 1.0
NOTICE_S = 3.0


@pytest.fixture(scope="module", autouse=True)
def quick_checks() -> Iterator[None]:
    start_fork_server()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def transport_of(
    *, max_num_lanes: int = 16, max_idle_s: float = 30.0, idle_timeout_s: float = IDLE_S
) -> CollectiveTransport:
    limits = LaneLimits(
        connect_timeout_s=2.0,
        idle_timeout_s=idle_timeout_s,
        total_timeout_s=20.0,
        max_num_lanes=max_num_lanes,
        max_num_served_lanes=4,
        max_idle_s=max_idle_s,
    )
    return CollectiveTransport("127.0.0.1", limits=limits, end=END)


def held() -> tuple[int, int]:
    """Descriptors of sockets, and threads of pairs."""
    sockets = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    threads = [each for each in threading.enumerate() if each.name == "kv-collective"]
    return sum(each.startswith("socket:") for each in sockets), len(threads)


@contextlib.asynccontextmanager
async def serving(
    may_read: MayRead = anyone, *, num_blocks: int = NUM_BLOCKS, on_read: OnRead = ignore
) -> AsyncIterator[tuple[CollectiveTransport, CollectiveRegionServer, KvMemory, KvMemory]]:
    """A transport that serves one memory to itself and reads into another; both ends close."""
    gc.collect()
    before = held()
    transport = transport_of()
    with (
        kv_memory(num_blocks, BLOCK_BYTES, seed=SEED) as source,
        kv_memory(num_blocks, BLOCK_BYTES) as target,
    ):
        server = await transport.serve(source, may_read, on_read)
        try:
            yield transport, server, source, target
        finally:
            await transport.close()
            await server.close()
            gc.collect()
            assert held() == before
            assert asyncio.all_tasks() == {asyncio.current_task()}


async def read(
    transport: CollectiveTransport, region: RemoteRegion, target: KvMemory, ids: Sequence[int]
) -> None:
    await transport.read(region, blocks(*ids), target, blocks(*ids))


# Groups -------------------------------------------------------------------------------------------


async def test_reads_of_a_pair_share_one_group_that_is_dropped_when_idle() -> None:
    transport = transport_of(max_idle_s=0.3)
    with kv_memory(8, BLOCK_BYTES, seed=SEED) as source, kv_memory(8, BLOCK_BYTES) as target:
        server = await transport.serve(source, anyone)
        before = held()
        async with asyncio.TaskGroup() as reads:
            for block in range(8):
                reads.create_task(read(transport, server.region, target, [block]))
        assert held()[1] == before[1] + 2, "one thread at each of the two ends"
        assert target.bytes == source.bytes
        await wait_until(lambda: held() == before, within_s=NOTICE_S, what="the group is dropped")
        await read(transport, server.region, target, [3])
        await transport.close()
        await server.close()


async def test_groups_are_few_and_the_least_recently_used_makes_room() -> None:
    transport = transport_of(max_num_lanes=2)
    with kv_memory(8, BLOCK_BYTES, seed=SEED) as source, kv_memory(8, BLOCK_BYTES) as target:
        servers = [await transport.serve(source, anyone) for _ in range(4)]
        before = held()
        for server in [*servers, servers[0]]:
            await read(transport, server.region, target, [1])
        await wait_until(lambda: held()[1] <= before[1] + 2 * 2, within_s=NOTICE_S, what="two")
        async with asyncio.TaskGroup() as reads:  # more than there may be groups
            for server in servers:
                reads.create_task(read(transport, server.region, target, [2]))
        assert target.block(BlockId(2)) == source.block(BlockId(2))
        await transport.close()
        for server in servers:
            await server.close()


# Peers that die or stop in the middle -------------------------------------------------------------


@contextlib.asynccontextmanager
async def peer_in_the_middle() -> AsyncIterator[tuple[KvPeer, CollectiveTransport, RemoteRegion]]:
    before = held()
    peer = KvPeer("collective", 200, BLOCK_BYTES, SEED)
    transport = transport_of()
    try:
        yield peer, transport, await asyncio.to_thread(peer.region)
    finally:
        peer.close()
        await transport.close()
        gc.collect()
        assert held()[1] == before[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_peer_lost_in_the_middle_fails_the_read_and_the_next_peer_is_read(
    number: signal.Signals,
) -> None:
    async with peer_in_the_middle() as (peer, transport, region):
        with kv_memory(200, BLOCK_BYTES) as target:
            reading = asyncio.create_task(read(transport, region, target, range(150)))
            await wait_until(
                lambda: any(target.block(BlockId(4))[:64]), within_s=NOTICE_S, what="it began"
            )
            peer.send_signal(number)
            began_s = time.monotonic()
            with pytest.raises(TransferFailed):
                await reading
            assert time.monotonic() - began_s < NOTICE_S
            written = bytes(target.bytes[-BLOCK_BYTES:])
            with contextlib.suppress(TransferFailed):
                await transport.close_peer(region)
            assert target.bytes[-BLOCK_BYTES:] == written
            again = KvPeer("collective", 200, BLOCK_BYTES, SEED)
            await read(transport, await asyncio.to_thread(again.region), target, [7])
            again.close()
            content = Random(SEED).randbytes(8 * BLOCK_BYTES)
            assert target.block(BlockId(7)) == content[7 * BLOCK_BYTES :]


async def test_a_reader_that_vanishes_in_the_middle_costs_the_server_its_group_only() -> None:
    events: asyncio.Queue[ReadEvent] = asyncio.Queue()
    async with serving(on_read=events.put_nowait) as (transport, server, source, target):
        other = transport_of()
        reading = asyncio.create_task(read(other, server.region, target, range(NUM_BLOCKS)))
        assert not (await events.get()).is_over
        closing = asyncio.create_task(other.close())
        async with asyncio.timeout(NOTICE_S):
            assert (await events.get()).is_over
        with contextlib.suppress(TransferFailed):
            await reading
        await closing
        await read(transport, server.region, target, [2])
        assert target.block(BlockId(2)) == source.block(BlockId(2))


class Rogue:
    """The owner's end of a lane, which says what it is told to."""

    def __init__(self, idle_timeout_s: float) -> None:
        self._limits = LaneLimits(
            connect_timeout_s=2, idle_timeout_s=idle_timeout_s, total_timeout_s=20
        )
        self.region = RemoteRegion(
            transport="collective",
            address={"host": "127.0.0.1", "token": "00" * 16, "backends": "gloo"},
            num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES,
        )
        self.controls: asyncio.Queue[Control] = asyncio.Queue()

    async def lane(self) -> Lane:
        """Of the next reader, once the group is made."""
        control = await self.controls.get()
        hello = await control.frame(NOTICE_S)
        assert decode_hello(hello.body, bytes(16)) == (END, "gloo")
        lane = Lane(control, block_bytes=BLOCK_BYTES, limits=self._limits)
        await lane.meet(GlooPair, rank=0)
        return lane


@contextlib.asynccontextmanager
async def rogue(
    idle_timeout_s: float = IDLE_S,
) -> AsyncIterator[tuple[Rogue, CollectiveTransport]]:
    owner, transport = Rogue(idle_timeout_s), transport_of(idle_timeout_s=idle_timeout_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Control(owner.controls.put_nowait), "127.0.0.1", 0)
    owner.region.address["port"] = str(server.sockets[0].getsockname()[1])
    try:
        yield owner, transport
    finally:
        server.close()
        await transport.close()


async def test_after_a_cancelled_read_a_peer_that_goes_on_sending_writes_nothing() -> None:
    """It heeds no STOP. What it sends is received to the end, and the group is used again."""
    num_blocks = blocks_per_piece(BLOCK_BYTES)
    async with rogue(idle_timeout_s=10.0) as (owner, transport):
        with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as target, kv_memory(4, BLOCK_BYTES, 3) as ours:
            reading = asyncio.create_task(read(transport, owner.region, target, range(NUM_BLOCKS)))
            lane = await owner.lane()
            assert (await lane.frame()).kind is Kind.READ

            async def send_piece(slot: int) -> None:
                ids = blocks(*range(num_blocks))
                await lane.gather(slot, ours, list(block_runs(range(num_blocks), ids)))
                lane.control.send(encode_piece(num_blocks))
                lane.start_send(slot, num_blocks)
                await lane.settle()

            for number in range(3):
                await send_piece(number % NUM_SLOTS)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            target.bytes[:] = b"\xee" * target.num_bytes
            waiting = asyncio.create_task(read(transport, owner.region, target, [0]))
            for number in range(2):
                await send_piece(number % NUM_SLOTS)
            assert (await lane.frame()).kind is Kind.STOP
            lane.control.send(encode_end(Ending.ALL_SENT))
            assert target.bytes == b"\xee" * target.num_bytes
            assert (await lane.frame()) == Frame(Kind.READ, bytes(4))
            lane.control.send(encode_piece(1))
            lane.start_send(0, 1)
            await lane.settle()
            lane.control.send(encode_end(Ending.ALL_SENT))
            await waiting
            await lane.close()


@pytest.mark.parametrize("what", ["silence", "too much", "an early end", "a hello", "nothing"])
async def test_a_peer_that_breaks_the_protocol_fails_the_read_in_time(what: str) -> None:
    said = {
        "silence": b"",
        "too much": encode_piece(blocks_per_piece(BLOCK_BYTES) + 1),
        "an early end": encode_end(Ending.ALL_SENT),
        "a hello": encode_hello(bytes(16), END, "gloo"),
        "nothing": encode_piece(1),  # announced and never sent
    }
    async with rogue() as (owner, transport):
        with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as target:
            reading = asyncio.create_task(read(transport, owner.region, target, range(8)))
            lane = await owner.lane()
            lane.control.send(said[what])
            began_s = time.monotonic()
            with pytest.raises(TransferFailed):
                await reading
            assert time.monotonic() - began_s < NOTICE_S
            assert target.bytes == bytes(target.num_bytes)
            await lane.close()


async def test_a_peer_that_makes_no_group_fails_the_read_in_time() -> None:
    async with rogue() as (owner, transport):
        with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as target:
            reading = asyncio.create_task(read(transport, owner.region, target, [0]))
            control = await owner.controls.get()
            with pytest.raises(TransferFailed, match="no group within 2 s"):
                await reading
            await control.close()


# A server among strangers -------------------------------------------------------------------------


async def connect(region: RemoteRegion) -> Control:
    loop = asyncio.get_running_loop()
    host, port = region.address["host"], int(region.address["port"])
    _, control = await loop.create_connection(Control, host, port)
    return control


async def test_blocks_that_are_not_on_offer_are_refused_and_the_group_is_kept() -> None:
    async def may_read(block_ids: Sequence[BlockId]) -> bool:
        return max(block_ids) < 8

    async with serving(may_read) as (transport, server, source, target):
        await read(transport, server.region, target, [1])
        before = held()
        with pytest.raises(TransferFailed, match="not on offer"):
            await read(transport, server.region, target, [0, 9])
        assert target.block(BlockId(0)) == bytes(BLOCK_BYTES)
        await read(transport, server.region, target, [2])
        assert target.block(BlockId(2)) == source.block(BlockId(2))
        assert (held(), server.num_refused_reads) == (before, 1)
        assert server.num_dropped_connections == 0


async def test_blocks_taken_back_while_they_are_sent_end_the_reply() -> None:
    calls: list[object] = []

    async def only_once(block_ids: Sequence[BlockId]) -> bool:
        calls.append(block_ids)
        return len(calls) == 1

    async with serving(only_once) as (transport, server, _, target):
        with pytest.raises(TransferFailed, match="not on offer"):
            await read(transport, server.region, target, range(12))
        assert len(calls) == 2


async def test_strangers_are_dropped_without_a_word_and_readers_are_served() -> None:
    async with serving() as (transport, server, source, target):
        token = bytes.fromhex(server.region.address["token"])
        said = {
            "garbage": Random(7).randbytes(500),
            "another token": encode_hello(bytes(16), END, "gloo"),
            "another version": encode_hello(token, END, "gloo").replace(b"PDKC\x01", b"PDKC\x09"),
            "no such backend": encode_hello(token, END, "mpi"),
            "a read before the hello": encode_read(blocks(1)),
            "too long": bytes([Kind.READ]) + b"\xff\xff\xff\xff",
            "half a hello": encode_hello(token, END, "gloo")[:20],
        }
        for name, frames in said.items():
            stranger = await connect(server.region)
            stranger.send(frames)
            async with asyncio.timeout(NOTICE_S):
                await stranger.lost
            assert not stranger.poll(Kind.KEY), name
        greedy = await connect(server.region)
        greedy.send(encode_hello(token, END, "gloo"))
        for number in range(100):
            greedy.send(encode_key(f"key {number}", b"x"))
        await asyncio.wait_for(greedy.lost, NOTICE_S)
        await wait_until(
            lambda: server.num_dropped_connections == len(said) + 1,
            within_s=10,
            what="all are dropped, the last one with its half-made group",
        )
        await read(transport, server.region, target, [4])
        assert target.block(BlockId(4)) == source.block(BlockId(4))


async def test_a_block_beyond_the_region_or_a_read_within_a_read_ends_the_connection() -> None:
    async with serving() as (_, server, _, _):
        for frames in (encode_read(blocks(NUM_BLOCKS)), encode(Kind.MADE)):
            control = await connect(server.region)
            limits = LaneLimits(connect_timeout_s=2, idle_timeout_s=IDLE_S, total_timeout_s=20)
            lane = Lane(control, block_bytes=BLOCK_BYTES, limits=limits)
            token = bytes.fromhex(server.region.address["token"])
            control.send(encode_hello(token, END, "gloo"))
            await lane.meet(GlooPair, rank=1)
            control.send(frames)
            await asyncio.wait_for(control.lost, NOTICE_S)
            await lane.close()
        await wait_until(
            lambda: server.num_dropped_connections == 2, within_s=NOTICE_S, what="both are dropped"
        )


async def test_idle_strangers_cannot_keep_a_reader_out() -> None:
    async with serving() as (transport, server, source, target):
        strangers = [await connect(server.region) for _ in range(10)]
        await read(transport, server.region, target, [3])
        assert target.block(BlockId(3)) == source.block(BlockId(3))
        for stranger in strangers:
            await stranger.close()
