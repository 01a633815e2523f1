"""What every transport promises, on each of them, against a real process and a real network."""

import asyncio
import base64
import contextlib
import gc
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import structlog
import uvloop

from kvtransfer.landing import Landing
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.transports import open_transports
from kvtransfer.transports.base import End, MayRead, ReadEvent, Transport
from kvtransfer.transports.collective import CollectiveTransport
from kvtransfer.transports.collective_lane import LaneLimits
from kvtransfer.transports.nixl import NixlTransport
from kvtransfer.transports.nixl_agent import is_installed
from kvtransfer.transports.shm import ShmTransport
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.tcp_frames import (
    REPLY_HEADER_BYTES,
    REQUEST_HEADER_BYTES,
    Status,
    encode_reply,
    encode_request,
)
from kvtransfer.transports.tcp_server import TcpLimits, TcpRegionServer
from pdserve.config.timers import Timers
from pdserve.domain.errors import Reason, TransferFailed
from pdserve.domain.ids import BlockId, Epoch
from pdserve.domain.messages import BlocksOffered, RemoteRegion
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import (
    BLOCK_SIZE,
    anyone,
    blocks,
    handoff_id,
    kv_memory,
    layout_of,
    only,
    reader_of,
)
from tests.support.kv_peer import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    SEED,
    peer_process,
    start_fork_server,
)

NOTICE_S = 3.0  # within which every fault of a peer shows
END = End(Epoch(77), 3)
SHORT_NOTICE_S = 1.5  # and this where timers are set far below their defaults


def tcp_transport(
    *,
    idle_timeout_s: float = 2.0,
    total_timeout_s: float = 30.0,
    max_num_connections_per_peer: int = 8,
    max_num_served_connections: int = 256,
    end: End = END,
) -> TcpTransport:
    limits = TcpLimits(
        connect_timeout_s=2.0,
        idle_timeout_s=idle_timeout_s,
        total_timeout_s=total_timeout_s,
        max_num_connections_per_peer=max_num_connections_per_peer,
        max_num_served_connections=max_num_served_connections,
    )
    return TcpTransport(limits=limits, end=end)


def nixl_transport() -> NixlTransport:
    return NixlTransport(idle_timeout_s=2.0, total_timeout_s=30.0)


def collective_transport(
    *, max_num_lanes: int = 16, max_num_served_lanes: int = 128, max_idle_s: float = 30.0
) -> CollectiveTransport:
    limits = LaneLimits(
        connect_timeout_s=2.0,
        idle_timeout_s=2.0,
        total_timeout_s=30.0,
        max_num_lanes=max_num_lanes,
        max_num_served_lanes=max_num_served_lanes,
        max_idle_s=max_idle_s,
    )
    return CollectiveTransport("127.0.0.1", limits=limits, end=END)


MAKERS: dict[str, Callable[[], Transport]] = {
    "shm": ShmTransport,
    "tcp": tcp_transport,
    "nixl": nixl_transport,
    "collective": collective_transport,
}


pytestmark = pytest.mark.filterwarnings('ignore:Overriding the "event_loop_policy"')


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest, event_loop_policy: object) -> str:
    chosen: str = request.param
    if chosen == "nixl":
        if not is_installed():
            pytest.skip("needs nixl: pip install 'pdserve[nixl]'")
        if not isinstance(event_loop_policy, uvloop.EventLoopPolicy):
            pytest.skip("its thread touches no loop, so one kind is enough")
    return chosen


def open_fds() -> Counter[str]:
    """How many descriptors of each kind this process has."""
    fds = Path("/proc/self/fd")
    return Counter(os.readlink(fd).partition(":[")[0] for fd in fds.iterdir() if fd.is_symlink())


def num_fds() -> int:
    return open_fds().total()


@pytest.fixture(scope="module", autouse=True)
def quick_checks() -> Iterator[None]:
    """What is there before the first test is looked through by no `gc.collect`: torch is a lot."""
    start_fork_server()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
async def nothing_held(event_loop_policy: object) -> AsyncIterator[None]:
    """Every test ends with as many descriptors and tasks as it began with."""
    await asyncio.to_thread(bool)  # starts the loop's thread pool
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    server.close()  # uvloop keeps a descriptor for itself from its first one on
    gc.collect()
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before
    assert asyncio.all_tasks() == {asyncio.current_task()}


@asynccontextmanager
async def transport_of(name: str) -> AsyncIterator[Transport]:
    transport = MAKERS[name]()
    try:
        yield transport
    finally:
        await transport.close()


@contextlib.contextmanager
def memories(num_blocks: int, block_bytes: int) -> Iterator[tuple[KvMemory, KvMemory]]:
    """One with content, and an empty one of the same shape."""
    with (
        kv_memory(num_blocks, block_bytes, seed=6) as source,
        kv_memory(num_blocks, block_bytes) as target,
    ):
        yield source, target


@pytest.fixture
def target() -> Iterator[KvMemory]:
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as memory:
        yield memory


@asynccontextmanager
async def fails_within(limit_s: float, why: str | None = None) -> AsyncIterator[None]:
    start_s = time.monotonic()
    with pytest.raises(TransferFailed, match=why):
        yield
    assert time.monotonic() - start_s < limit_s


async def connect(region: RemoteRegion) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    address = region.address
    await asyncio.get_running_loop().sock_connect(sock, (address["host"], int(address["port"])))
    return sock


# Exact bytes --------------------------------------------------------------------------------------

LISTS = {
    "none": ((), ()),
    "one": ((5,), (9,)),
    "scattered": ((5, 3, 40, 41, 42, 0), (0, 63, 10, 11, 13, 1)),
    "one run": (tuple(range(8, 40)), tuple(range(1, 33))),
    "the same block twice": ((7, 7), (1, 2)),
}


@pytest.mark.parametrize(("remote", "local"), LISTS.values(), ids=LISTS.keys())
async def test_listed_blocks_arrive_exactly_and_no_others_change(
    name: str, target: KvMemory, remote: tuple[int, ...], local: tuple[int, ...]
) -> None:
    async with peer_process(name) as peer, transport_of(name) as transport:
        assert transport.can_reach(peer.region)
        await transport.read(peer.region, blocks(*remote), target, blocks(*local))
        for block in range(NUM_BLOCKS):
            expected = peer.block(remote[local.index(block)]) if block in local else bytes(4096)
            assert target.block(BlockId(block)) == expected


async def test_concurrent_reads_do_not_mix(name: str, target: KvMemory) -> None:
    async with peer_process(name) as peer, transport_of(name) as transport:
        order = Random(1).sample(range(48), 48)
        async with asyncio.TaskGroup() as reads:
            for place, remote in enumerate(order):
                reads.create_task(
                    transport.read(peer.region, blocks(remote), target, blocks(place))
                )
        for place, remote in enumerate(order):
            assert target.block(BlockId(place)) == peer.block(remote)


@pytest.mark.parametrize(("num_blocks", "block_bytes"), [(4, 8 << 20), (1200, 8192)])
async def test_reads_larger_than_any_buffer_arrive_exactly(
    name: str, num_blocks: int, block_bytes: int
) -> None:
    num_read = num_blocks * 3 // 4
    remote = Random(2).sample(range(num_read), num_read)
    local = Random(3).sample(range(num_blocks), num_read)
    async with peer_process(name, num_blocks, block_bytes) as peer, transport_of(name) as transport:
        with kv_memory(num_blocks, block_bytes) as target:
            await transport.read(peer.region, blocks(*remote), target, blocks(*local))
            for one, two in zip(remote, local, strict=True):
                assert target.block(BlockId(two)) == peer.block(one)


async def test_more_blocks_than_one_request_can_name_arrive_exactly(name: str) -> None:
    with kv_memory(20_000, 8, seed=4) as source, kv_memory(20_000, 8) as target:
        async with transport_of(name) as transport:
            server = await transport.serve(source, anyone)
            order = Random(5).sample(range(20_000), 20_000)
            await transport.read(server.region, blocks(*order), target, blocks(*range(20_000)))
            await server.close()
            for place, remote in enumerate(order):
                assert target.block(BlockId(place)) == source.block(BlockId(remote))


async def test_the_serving_side_hears_of_each_read_and_who_reads(
    name: str, target: KvMemory
) -> None:
    events: list[ReadEvent] = []
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES, seed=4) as source:
        async with transport_of(name) as transport:
            await transport.register(target)
            await transport.register(target)
            server = await transport.serve(source, only({1, 2, 3}), events.append)
            await transport.read(server.region, blocks(3, 1), target, blocks(0, 1))
            if server.sees_reads:
                with pytest.raises(TransferFailed):
                    await transport.read(server.region, blocks(4), target, blocks(0))
            await server.close()
    expected = [ReadEvent(END, blocks(3, 1), is_over) for is_over in (False, True)]
    assert events == (expected if server.sees_reads else [])


async def test_the_serving_side_hears_the_end_of_a_read_that_breaks() -> None:
    events: asyncio.Queue[ReadEvent] = asyncio.Queue()
    with memories(16, 4 << 20) as (source, target):
        async with transport_of("tcp") as transport:
            server = await transport.serve(source, anyone, events.put_nowait)
            wanted = blocks(*range(16))
            reading = asyncio.create_task(transport.read(server.region, wanted, target, wanted))
            assert not (await events.get()).is_over
            reading.cancel()
            await asyncio.wait([reading])
            async with asyncio.timeout(NOTICE_S):
                assert (await events.get()).is_over
            await server.close()


class DeviceMemory(KvMemory):
    """Whose bytes a transport may only have by copies."""

    def host_blocks(self, block_ids: object) -> None:  # type: ignore[override]
        return None


async def test_memory_that_is_not_the_hosts_is_served_and_read_into_through_copies() -> None:
    layout = layout_of(BLOCK_BYTES)
    source, target = DeviceMemory(layout, 8), DeviceMemory(layout, 8)
    source.bytes[:] = Random(9).randbytes(source.num_bytes)
    async with transport_of("tcp") as transport:
        server = await transport.serve(source, anyone)
        await transport.read(server.region, blocks(5, 6, 1), target, blocks(2, 7, 0))
        await server.close()
    for remote, local in ((5, 2), (6, 7), (1, 0)):
        assert target.block(BlockId(local)) == source.block(BlockId(remote))
    assert target.block(BlockId(1)) == bytes(BLOCK_BYTES)
    source.close()
    target.close()


async def test_a_region_of_another_shape_is_refused(name: str) -> None:
    async with peer_process(name) as peer, transport_of(name) as transport:
        with kv_memory(4, 2048) as target, pytest.raises(TransferFailed):
            await transport.read(peer.region, blocks(0), target, blocks(0))


# Peers that die, stop or are replaced -------------------------------------------------------------


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_peer_killed_before_a_read_fails_it(
    name: str, target: KvMemory, is_known: bool
) -> None:
    async with peer_process(name) as peer, transport_of(name) as transport:
        if is_known:
            await transport.read(peer.region, blocks(0), target, blocks(0))
        await peer.kill()
        async with fails_within(NOTICE_S):
            await transport.read(peer.region, blocks(0), target, blocks(0))


async def test_a_killed_peer_is_not_reached_through_shared_memory(target: KvMemory) -> None:
    async with peer_process("shm") as peer, transport_of("shm") as transport:
        assert transport.can_reach(peer.region)
        await peer.kill()
        assert not transport.can_reach(peer.region)


async def test_a_peer_killed_during_a_copy_fails_it_or_the_next_one() -> None:
    """Its memory outlives it in our map, so the copy that runs may still end well and exact."""
    num_blocks, block_bytes = 48, 1 << 20
    wanted = blocks(*range(num_blocks * 3 // 4))
    async with peer_process("shm", num_blocks, block_bytes) as peer, transport_of("shm") as shm:
        with kv_memory(num_blocks, block_bytes) as target:
            assert shm.can_reach(peer.region)
            reading = asyncio.create_task(shm.read(peer.region, wanted, target, wanted))
            await asyncio.sleep(0)
            await peer.kill()
            try:
                await reading
            except TransferFailed:
                pass
            else:
                num_bytes = len(wanted) * block_bytes
                assert target.bytes[:num_bytes] == peer.content[:num_bytes]
            async with fails_within(NOTICE_S):
                await shm.read(peer.region, wanted[:1], target, wanted[:1])


@asynccontextmanager
async def raw_server(
    converse: Callable[[socket.socket], Coroutine[object, object, None]],
) -> AsyncIterator[int]:
    """A port where `converse` runs for each connection; without the loop's own transports."""
    loop = asyncio.get_running_loop()

    async def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            await converse(sock)

    async def accept(listener: socket.socket) -> None:
        async with asyncio.TaskGroup() as connections:
            while True:
                sock, _ = await loop.sock_accept(listener)
                sock.setblocking(False)
                connections.create_task(serve(sock))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(accept(listener))
        try:
            yield listener.getsockname()[1]
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])


@asynccontextmanager
async def proxy_to(
    region: RemoteRegion, damage: Callable[[int, bytearray], bytearray]
) -> AsyncIterator[RemoteRegion]:
    """The region through a proxy. `damage` is given each piece of the replies and its offset.

    It returns what to pass on. The end of one side is passed on to the other.
    """
    loop = asyncio.get_running_loop()

    async def pump(
        source: socket.socket,
        sink: socket.socket,
        change: Callable[[int, bytearray], bytearray] = lambda offset, data: data,
    ) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(source, 1 << 16):
                await loop.sock_sendall(sink, change(offset, bytearray(data)))
                offset += len(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    async def converse(down: socket.socket) -> None:
        with await connect(region) as up:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(pump(down, up))
                pumps.create_task(pump(up, down, damage))

    async with raw_server(converse) as port:
        yield replace(region, address={**region.address, "port": str(port)})


async def test_a_peer_killed_in_the_middle_of_a_reply_fails_the_read(target: KvMemory) -> None:
    is_halfway = asyncio.Event()
    half = 20 * BLOCK_BYTES

    def stop_halfway(offset: int, data: bytearray) -> bytearray:
        if offset + len(data) >= half:
            is_halfway.set()
        return data[: max(0, half - offset)]

    async with (
        peer_process("tcp") as peer,
        transport_of("tcp") as transport,
        proxy_to(peer.region, stop_halfway) as region,
    ):
        wanted = blocks(*range(40))
        reading = asyncio.create_task(transport.read(region, wanted, target, wanted))
        await is_halfway.wait()
        async with fails_within(NOTICE_S):
            await peer.kill()
            await reading


async def test_a_stopped_peer_fails_a_network_read_by_the_idle_timeout(target: KvMemory) -> None:
    async with peer_process("tcp") as peer, transport_of("tcp") as transport:
        await transport.read(peer.region, blocks(0), target, blocks(0))
        peer.process.send_signal(signal.SIGSTOP)
        async with fails_within(NOTICE_S, "silent for 2 s"):
            await transport.read(peer.region, blocks(1), target, blocks(1))
        peer.process.send_signal(signal.SIGCONT)
        await transport.read(peer.region, blocks(2), target, blocks(2))
        assert target.block(BlockId(2)) == peer.block(2)


async def test_a_stopped_peer_can_still_be_read_through_shared_memory(target: KvMemory) -> None:
    async with peer_process("shm") as peer, transport_of("shm") as transport:
        peer.process.send_signal(signal.SIGSTOP)
        await transport.read(peer.region, blocks(1), target, blocks(1))
        assert target.block(BlockId(1)) == peer.block(1)


async def test_a_reply_that_stops_halfway_fails_by_the_idle_timeout(target: KvMemory) -> None:
    def stop(offset: int, data: bytearray) -> bytearray:
        return data[: max(0, BLOCK_BYTES - offset)]

    async with (
        peer_process("tcp") as peer,
        transport_of("tcp") as transport,
        proxy_to(peer.region, stop) as region,
        fails_within(NOTICE_S),
    ):
        await transport.read(region, blocks(0, 1, 2), target, blocks(0, 1, 2))


async def test_a_peer_that_trickles_fails_by_the_total_timeout(target: KvMemory) -> None:
    """Each byte comes within the idle timeout, and still the read ends."""

    async def trickle(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_recv(sock, 1)
        await loop.sock_sendall(sock, encode_reply(Status.OK, BLOCK_BYTES))
        while True:
            await loop.sock_sendall(sock, b"x")
            await asyncio.sleep(0.01)

    async with raw_server(trickle) as port:
        transport = tcp_transport(idle_timeout_s=0.2, total_timeout_s=0.4)
        async with fails_within(NOTICE_S, r"longer than 0\.4 s"):
            await transport.read(region_at(port), blocks(0), target, blocks(0))
        await transport.close()


def region_at(port: int) -> RemoteRegion:
    return RemoteRegion(
        transport="tcp",
        address={"host": "127.0.0.1", "port": str(port), "token": "00" * 16},
        num_blocks=NUM_BLOCKS,
        block_bytes=BLOCK_BYTES,
    )


@asynccontextmanager
async def slow_peer(reply_s: float) -> AsyncIterator[RemoteRegion]:
    """Answers each request for one block, with zeros, after `reply_s`."""

    async def answer(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while await loop.sock_recv(sock, REQUEST_HEADER_BYTES + 4):
            await asyncio.sleep(reply_s)
            await loop.sock_sendall(sock, encode_reply(Status.OK, BLOCK_BYTES) + bytes(BLOCK_BYTES))

    async with raw_server(answer) as port:
        yield region_at(port)


async def test_waiting_for_ones_own_other_reads_is_not_the_silence_of_the_peer(
    target: KvMemory,
) -> None:
    """Six reads of 0.2 s through one connection; the peer may be silent for 0.4 s, or take 0.5."""
    transport = tcp_transport(
        idle_timeout_s=0.4, total_timeout_s=0.5, max_num_connections_per_peer=1
    )
    with structlog.testing.capture_logs() as logs:
        async with slow_peer(0.2) as region, asyncio.TaskGroup() as reads:
            for block in range(6):
                reads.create_task(transport.read(region, blocks(0), target, blocks(block)))
    await transport.close()
    waits = [entry for entry in logs if entry["event"] == "kv_read.waited"]
    assert waits, "a wait that long is told"
    assert {entry["max_num_connections"] for entry in waits} == {1}


async def test_wait_for_a_connection_ends_with_the_callers_deadline_and_takes_none(
    target: KvMemory,
) -> None:
    transport = tcp_transport(idle_timeout_s=5.0, max_num_connections_per_peer=1)
    async with slow_peer(0.5) as region:
        first = asyncio.create_task(transport.read(region, blocks(0), target, blocks(0)))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await transport.read(region, blocks(0), target, blocks(1))
        await first
        await transport.read(region, blocks(0), target, blocks(2))
        await transport.close()


async def test_closing_ends_the_reads_that_wait_for_a_connection(target: KvMemory) -> None:
    transport = tcp_transport(idle_timeout_s=5.0, max_num_connections_per_peer=1)
    async with slow_peer(60.0) as region:
        reads = [
            asyncio.create_task(transport.read(region, blocks(0), target, blocks(block)))
            for block in range(3)
        ]
        await asyncio.sleep(0.05)
        await transport.close_peer(region)
        for read in reads:
            async with fails_within(NOTICE_S, "connection to the peer broke"):
                await read
        await transport.close()


@pytest.mark.parametrize(
    "timers", [Timers(transfer_idle_s=0.2), Timers(transfer_idle_s=1e4, transfer_s=0.2)]
)
async def test_timers_say_how_long_a_reader_waits_for_a_silent_peer(
    target: KvMemory, timers: Timers
) -> None:
    async def never(sock: socket.socket) -> None:
        await asyncio.Event().wait()

    async with raw_server(never) as port:
        region = RemoteRegion(
            transport="tcp",
            address={"host": "127.0.0.1", "port": str(port), "token": "00" * 16},
            num_blocks=4,
            block_bytes=BLOCK_BYTES,
        )
        (transport,) = open_transports(["tcp"], "127.0.0.1", timers=timers)
        async with fails_within(SHORT_NOTICE_S):
            await transport.read(region, blocks(0), target, blocks(0))
        await transport.close()


async def test_timers_say_how_long_a_server_waits_for_a_request() -> None:
    (transport,) = open_transports(["tcp"], "127.0.0.1", timers=Timers(transfer_idle_s=0.2))
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as source:
        server = await transport.serve(source, anyone)
        sock = await connect(server.region)
        with sock:
            async with asyncio.timeout(SHORT_NOTICE_S):
                assert await asyncio.get_running_loop().sock_recv(sock, 1) == b"", "hung up on"
        await server.close()
    await transport.close()


@pytest.mark.parametrize("field", ["pid", "start", "fd", "host"])
async def test_shared_memory_of_a_process_that_is_not_the_one_named_is_not_read(
    target: KvMemory, field: str
) -> None:
    async with peer_process("shm") as peer, transport_of("shm") as transport:
        for value in ("1", "", "x", "-1", "9" * 30):
            region = replace(peer.region, address={**peer.region.address, field: value})
            assert not transport.can_reach(region)
            with pytest.raises(TransferFailed):
                await transport.read(region, blocks(0), target, blocks(0))


async def test_shared_memory_that_is_shorter_than_said_is_not_mapped(target: KvMemory) -> None:
    async with peer_process("shm") as peer, transport_of("shm") as transport:
        region = replace(peer.region, num_blocks=NUM_BLOCKS + 1)
        assert not transport.can_reach(region)
        with pytest.raises(TransferFailed):
            await transport.read(region, blocks(NUM_BLOCKS), target, blocks(0))


async def test_a_descriptor_that_is_not_kv_memory_is_not_opened(
    target: KvMemory, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    fd = os.open(pipe, os.O_RDWR)  # opening it read-only, as a reader would, could block for ever
    async with transport_of("shm") as transport:
        with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as own:
            server = await transport.serve(own, anyone)
            assert transport.can_reach(server.region)
            region = replace(server.region, address={**server.region.address, "fd": str(fd)})
            assert not transport.can_reach(region)
    os.close(fd)


# Cancellation -------------------------------------------------------------------------------------


async def cancel_after_turns(reading: asyncio.Task[None], num_turns: int) -> None:
    for _ in range(num_turns):
        await asyncio.sleep(0)
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading


@pytest.mark.parametrize("num_turns", [*range(12), 20, 40, 80, 160, 320])
async def test_a_read_cancelled_at_any_turn_writes_nothing_afterwards(
    name: str, num_turns: int
) -> None:
    num_blocks, block_bytes = 256, 32_768
    first, second = blocks(*range(128)), blocks(*range(128, 256))
    with memories(num_blocks, block_bytes) as (source, target):
        async with transport_of(name) as transport:
            server = await transport.serve(source, anyone)
            reading = asyncio.create_task(transport.read(server.region, first, target, first))
            await cancel_after_turns(reading, num_turns)
            target.bytes[: 128 * block_bytes] = b"\xee" * (128 * block_bytes)
            await transport.read(server.region, second, target, second)
            await server.close()
            assert target.bytes[: 128 * block_bytes] == b"\xee" * (128 * block_bytes)
            assert target.bytes[128 * block_bytes :] == source.bytes[128 * block_bytes :]


@pytest.mark.parametrize("num_turns", [0, 1, 2, 3, 5, 8, 13, 21, 34])
async def test_a_cancelled_landing_writes_nothing_afterwards(name: str, num_turns: int) -> None:
    """2 MiB, so that both the copy and the digests run on threads."""
    num_blocks, block_bytes = 64, 32_768
    wanted = blocks(*range(num_blocks))
    with memories(num_blocks, block_bytes) as (source, target):
        async with transport_of(name) as transport:
            server = await transport.serve(source, anyone)
            receiver = receiver_of(transport, server.region, target, wanted)
            receiver.hear(offer_of(source, wanted))
            landing = asyncio.create_task(receiver.land())
            for _ in range(num_turns):
                await asyncio.sleep(0)
            landing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await landing
            receiver.end()
            target.bytes[:] = b"\xee" * target.num_bytes
            await server.close()
            await transport.close()
            assert target.bytes == b"\xee" * target.num_bytes


def receiver_of(
    transport: Transport, region: RemoteRegion, target: KvMemory, wanted: tuple[BlockId, ...]
) -> HandoffReceiver:
    return HandoffReceiver(
        handoff_id(),
        reader=reader_of(transport, region, target),
        landing=Landing(blocks=wanted, first_block=0, block_size=BLOCK_SIZE),
        num_tokens=len(wanted) * BLOCK_SIZE,
        vocab_size=1,
        on_first_token=lambda done: True,
    )


def offer_of(source: KvMemory, block_ids: tuple[BlockId, ...]) -> BlocksOffered:
    return BlocksOffered(
        handoff=handoff_id(),
        first_block=0,
        block_ids=block_ids,
        digests=tuple(
            block_digest(handoff_id(), place, source.block(block_id))
            for place, block_id in enumerate(block_ids)
        ),
    )


# Damage on the way --------------------------------------------------------------------------------


@asynccontextmanager
async def receiver_through_damage(
    target: KvMemory, num_damaged: int
) -> AsyncIterator[tuple[HandoffReceiver, KvMemory]]:
    """Eight blocks on offer through a proxy that flips one bit in each of the first replies.

    The reader asks again on the same connection, so one count of bytes runs through both replies.
    """
    reply_bytes = REPLY_HEADER_BYTES + 8 * BLOCK_BYTES
    flips = [REPLY_HEADER_BYTES + 3 * BLOCK_BYTES + 17, reply_bytes + REPLY_HEADER_BYTES + 99]

    def flip(offset: int, data: bytearray) -> bytearray:
        for place in flips[:num_damaged]:
            if offset <= place < offset + len(data):
                data[place - offset] ^= 4
        return data

    with kv_memory(NUM_BLOCKS, BLOCK_BYTES, seed=SEED) as source:
        async with (
            transport_of("tcp") as transport,
            peer_process("tcp") as peer,
            proxy_to(peer.region, flip) as region,
        ):
            wanted = blocks(*range(8))
            receiver = receiver_of(transport, region, target, wanted)
            receiver.hear(offer_of(source, wanted))
            yield receiver, source


@pytest.mark.parametrize("num_damaged", [0, 1])
async def test_a_bit_flipped_on_the_way_is_found_and_the_block_read_again(
    target: KvMemory, num_damaged: int
) -> None:
    async with receiver_through_damage(target, num_damaged) as (receiver, source):
        await receiver.land()
        assert target.bytes[: 8 * BLOCK_BYTES] == source.bytes[: 8 * BLOCK_BYTES]
        assert receiver.num_corrupt_blocks == num_damaged


async def test_a_bit_flipped_in_both_reads_fails_the_landing(target: KvMemory) -> None:
    async with receiver_through_damage(target, 2) as (receiver, _):
        with pytest.raises(TransferFailed) as failure:
            await receiver.land()
        assert failure.value.reason is Reason.KV_INTEGRITY
        assert receiver.num_landed_blocks == 0


# A server among strangers (tcp) -------------------------------------------------------------------


@asynccontextmanager
async def tcp_server(
    may_read: MayRead = anyone, max_num_connections: int = 256
) -> AsyncIterator[tuple[TcpTransport, TcpRegionServer, KvMemory]]:
    transport = tcp_transport(idle_timeout_s=0.3, max_num_served_connections=max_num_connections)
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES, seed=SEED) as source:
        server = await transport.serve(source, may_read)
        try:
            yield transport, server, source
        finally:
            await server.close()
            await transport.close()


def connection_tasks() -> list[asyncio.Task[object]]:
    """Of the servers in this process."""
    return [task for task in asyncio.all_tasks() if task.get_name() == "kv-tcp-connection"]


async def await_drop(sock: socket.socket) -> bytes:
    """What the server still said before it hung up."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
            said += data
    sock.close()
    return said


async def test_blocks_that_are_not_on_offer_are_refused(target: KvMemory) -> None:
    async with peer_process("tcp") as peer, transport_of("tcp") as transport:
        with pytest.raises(TransferFailed, match="not on offer"):
            await transport.read(peer.region, blocks(0, 63), target, blocks(0, 1))
        assert target.bytes == bytes(target.num_bytes)
        await transport.read(peer.region, blocks(0), target, blocks(0))
        assert target.block(BlockId(0)) == peer.block(0)


async def test_a_refused_read_is_counted_and_keeps_the_connection(target: KvMemory) -> None:
    async with tcp_server(only({1, 2})) as (transport, server, _):
        for _ in range(3):
            with pytest.raises(TransferFailed):
                await transport.read(server.region, blocks(1, 3), target, blocks(0, 1))
        await transport.read(server.region, blocks(1, 2), target, blocks(0, 1))
        assert (server.num_refused_reads, server.num_dropped_connections) == (3, 0)


async def test_blocks_taken_back_while_they_are_sent_end_the_reply() -> None:
    calls: list[object] = []

    async def only_once(block_ids: object) -> bool:
        calls.append(block_ids)
        return len(calls) == 1

    with kv_memory(4, 4 << 20, seed=1) as source, kv_memory(4, 4 << 20) as target:
        transport = tcp_transport()
        server = await transport.serve(source, only_once)
        async with fails_within(NOTICE_S):
            await transport.read(server.region, blocks(0, 1, 2), target, blocks(0, 1, 2))
        assert len(calls) == 2
        await server.close()
        await transport.close()


def rogue_requests(region: RemoteRegion) -> dict[str, bytes]:
    token = bytes.fromhex(region.address["token"])
    good = encode_request(token, END, blocks(1))
    return {
        "garbage": Random(7).randbytes(500),
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(100),
        "another token": encode_request(bytes(16), END, blocks(1)),
        "another version": good[:4] + b"\xff\xff" + good[6:],
        "too many blocks": good[:-8] + b"\xff\xff\xff\xff",
        "no blocks": good[:-8] + bytes(4),
        "a block beyond the region": encode_request(token, END, blocks(NUM_BLOCKS)),
        "half a header": good[:10],
        "half the blocks": encode_request(token, END, blocks(1, 2))[:-3],
        "nothing": b"",
    }


async def test_rogue_connections_are_dropped_without_a_word_and_others_are_served(
    target: KvMemory,
) -> None:
    async with tcp_server() as (transport, server, source):
        rogues = []
        for request in rogue_requests(server.region).values():
            sock = await connect(server.region)
            await asyncio.get_running_loop().sock_sendall(sock, request)
            rogues.append(sock)
        for block in range(32):
            await transport.read(server.region, blocks(block), target, blocks(block))
        assert target.bytes[: 32 * BLOCK_BYTES] == source.bytes[: 32 * BLOCK_BYTES]
        async with asyncio.timeout(NOTICE_S):
            assert await asyncio.gather(*map(await_drop, rogues)) == [b""] * len(rogues)
        assert server.num_dropped_connections == len(rogues) - 1  # silence is no fault


async def test_a_request_that_trickles_in_is_dropped_by_one_deadline() -> None:
    async with tcp_server() as (_, server, _):
        sock = await connect(server.region)
        request = encode_request(bytes.fromhex(server.region.address["token"]), END, blocks(1, 2))

        async def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in request:
                    await asyncio.get_running_loop().sock_sendall(sock, bytes([byte]))
                    await asyncio.sleep(0.1)  # less than the idle timeout

        trickling = asyncio.create_task(trickle())
        async with asyncio.timeout(NOTICE_S):
            assert await await_drop(sock) == b""
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)


async def test_a_reader_that_stops_reading_is_dropped(target: KvMemory) -> None:
    with kv_memory(16, 8 << 20) as source:
        transport = tcp_transport(idle_timeout_s=0.3)
        server = await transport.serve(source, anyone)
        sock = await connect(server.region)
        token = bytes.fromhex(server.region.address["token"])
        await asyncio.get_running_loop().sock_sendall(
            sock, encode_request(token, END, blocks(*range(16)))
        )
        await asyncio.get_running_loop().sock_recv(sock, 1)
        await asyncio.wait(connection_tasks(), timeout=NOTICE_S)
        assert server.num_dropped_connections == 1
        sock.close()
        await server.close()
        await transport.close()


async def test_idle_strangers_cannot_keep_a_reader_out(target: KvMemory) -> None:
    async with tcp_server(max_num_connections=4) as (transport, server, source):
        strangers = [await connect(server.region) for _ in range(12)]
        await transport.read(server.region, blocks(3), target, blocks(0))
        more = [await connect(server.region) for _ in range(12)]
        await transport.read(server.region, blocks(4), target, blocks(1))
        assert target.block(BlockId(0)) == source.block(BlockId(3))
        assert target.block(BlockId(1)) == source.block(BlockId(4))
        assert len(connection_tasks()) <= 4
        async with asyncio.timeout(NOTICE_S):
            await asyncio.gather(*map(await_drop, strangers + more))


async def test_a_bug_in_answering_costs_one_connection_only(target: KvMemory) -> None:
    is_broken = [True]

    async def may_read(block_ids: object) -> bool:
        if is_broken.pop():
            raise ZeroDivisionError
        is_broken.append(False)
        return True

    async with tcp_server(may_read) as (transport, server, source):
        with pytest.raises(TransferFailed):
            await transport.read(server.region, blocks(3), target, blocks(0))
        is_broken.append(False)
        await transport.read(server.region, blocks(3), target, blocks(0))
        assert target.block(BlockId(0)) == source.block(BlockId(3))
        assert server.num_dropped_connections == 1


async def test_a_region_of_a_past_life_on_the_same_port_is_not_read(target: KvMemory) -> None:
    async with tcp_server() as (transport, server, _):
        past = replace(server.region, address={**server.region.address, "token": "ab" * 16})
        async with fails_within(NOTICE_S):
            await transport.read(past, blocks(0), target, blocks(0))


async def test_connections_are_reused_and_limited(target: KvMemory) -> None:
    async with tcp_server() as (transport, server, _):
        await transport.read(server.region, blocks(0), target, blocks(0))
        before = num_fds()
        for block in range(20):
            await transport.read(server.region, blocks(block), target, blocks(block))
        assert num_fds() == before
        async with asyncio.TaskGroup() as reads:
            for block in range(40):
                wanted = blocks(block)
                reads.create_task(transport.read(server.region, wanted, target, wanted))
        assert num_fds() <= before + 2 * 8  # both ends of at most eight


async def test_a_connection_that_the_server_closed_is_replaced(target: KvMemory) -> None:
    transport = tcp_transport()
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES, seed=SEED) as source:
        server = await transport.serve(source, anyone)
        wanted = blocks(*range(8))
        await transport.read(server.region, wanted, target, wanted)
        for task in connection_tasks():
            task.cancel()
        await asyncio.wait(connection_tasks())
        await transport.read(server.region, wanted, target, wanted)
        await server.close()
    await transport.close()


# An agent of nixl ---------------------------------------------------------------------------------

needs_nixl = pytest.mark.skipif(
    not is_installed(), reason="needs nixl: pip install 'pdserve[nixl]'"
)
UVLOOP_ONLY = pytest.mark.parametrize(
    "event_loop_policy", [uvloop.EventLoopPolicy], indirect=True, ids=["uvloop"]
)


@needs_nixl
@UVLOOP_ONLY
async def test_an_address_that_is_not_what_an_agent_said_is_refused_and_harms_no_other(
    target: KvMemory,
) -> None:
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES, seed=SEED) as source:
        async with transport_of("nixl") as transport:
            server = await transport.serve(source, anyone)
            region, other = server.region, Random(3).randbytes(400)
            wrong: dict[str, list[str]] = {
                "version": ["1.4.0", ""],
                "agent": ["", "somebody"],
                "metadata": ["", "x", "A" * (1 << 20), region.address["metadata"][:-4]],
                "sum": ["", "00" * 16],
                "kind": ["FILE", ""],
                "device": ["-1", "x", "9" * 30],
                "start": ["-1", "x", "9" * 30, "0", str(int(region.address["start"]) + 4096)],
            }
            addresses = [
                {**region.address, field: value} for field in wrong for value in wrong[field]
            ]
            addresses += [
                {key: value for key, value in region.address.items() if key != field}
                for field in wrong
            ]
            garbage = base64.b64encode(other).decode(), hashlib.blake2b(other, digest_size=16)
            addresses.append(
                {**region.address, "metadata": garbage[0], "sum": garbage[1].hexdigest()}
            )
            for address in addresses:
                with pytest.raises(TransferFailed):
                    await transport.read(
                        replace(region, address=address), blocks(0), target, blocks(0)
                    )
            longer = replace(region, num_blocks=NUM_BLOCKS + 1)
            with pytest.raises(TransferFailed):
                await transport.read(longer, blocks(0), target, blocks(0))
            assert target.bytes == bytes(target.num_bytes)
            await transport.read(region, blocks(5), target, blocks(0))
            assert target.block(BlockId(0)) == source.block(BlockId(5))
            await server.close()


@needs_nixl
@UVLOOP_ONLY
async def test_what_a_read_that_was_given_up_still_brings_lands_in_no_block() -> None:
    """Of peers that stop, go on sending, or die. The process must also end well."""
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.support.nixl_over_tcp"],
        env={**os.environ, "UCX_TLS": "tcp,self", "PYTHONOPTIMIZE": ""},  # it has asserts
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stdout + process.stderr


# Letting go ---------------------------------------------------------------------------------------


async def test_closing_a_peer_forgets_it_and_it_can_be_read_again(
    name: str, target: KvMemory
) -> None:
    async with peer_process(name) as peer, transport_of(name) as transport:
        await transport.read(peer.region, blocks(0), target, blocks(0))
        await transport.close_peer(peer.region)
        before = num_fds()
        await transport.read(peer.region, blocks(0), target, blocks(0))
        assert num_fds() > before or name == "nixl", "its agent keeps some for the next peer"
        await transport.close_peer(peer.region)
        await transport.close_peer(peer.region)
        assert num_fds() == before
        await transport.read(peer.region, blocks(1), target, blocks(1))
        assert target.block(BlockId(1)) == peer.block(1)


async def test_closing_while_reads_run_ends_them_and_frees_everything(name: str) -> None:
    num_blocks, block_bytes = 64, 1 << 20
    with memories(num_blocks, block_bytes) as (source, target):
        transport = MAKERS[name]()
        server = await transport.serve(source, anyone)
        wanted = blocks(*range(num_blocks))
        reading = asyncio.create_task(transport.read(server.region, wanted, target, wanted))
        for _ in range(8):
            await asyncio.sleep(0)
        await transport.close()
        with contextlib.suppress(TransferFailed):
            await reading
        await server.close()
        await server.close()


async def test_closing_the_server_ends_its_readers(target: KvMemory) -> None:
    transport = tcp_transport()
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES, seed=SEED) as source:
        server = await transport.serve(source, anyone)
        await transport.read(server.region, blocks(0), target, blocks(0))
        await server.close()
        async with fails_within(NOTICE_S):
            await transport.read(server.region, blocks(0), target, blocks(0))
    await transport.close()
