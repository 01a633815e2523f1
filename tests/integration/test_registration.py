"""A worker stays registered through whatever its router does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from random import Random

import structlog

from pdserve.config.timers import Timers
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.messages import ClusterState, RegisterReply, WorkerHello, WorkerLoad
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES
from pdserve.rpc.links import RegisterServerLink, membership_service
from pdserve.rpc.registration import Registration
from pdserve.rpc.server import RpcServer
from tests.unit.router.builders import make_hello, make_load

TIMERS = Timers(connect_s=1.0, keepalive_s=0.5)
SOON_S = 10.0


def cluster_state() -> ClusterState:
    return ClusterState(router_id="r", model_name="m", public_address="", uptime_s=0.0)


class Registry:
    """A router's side: notes hellos and loads, and replies as the test wants."""

    def __init__(self, heartbeat_s: float = 0.02) -> None:
        self.hellos: asyncio.Queue[WorkerHello] = asyncio.Queue()
        self.loads: asyncio.Queue[WorkerLoad] = asyncio.Queue()
        self.heartbeat_s = heartbeat_s
        self.cut = asyncio.Event()

    async def handle(self, stream: RegisterServerLink) -> None:
        hello = await stream.receive()
        assert isinstance(hello, WorkerHello)
        self.hellos.put_nowait(hello)
        await stream.send(
            RegisterReply(
                router_id="r",
                epoch=Epoch(1),
                protocol_version=PROTOCOL_VERSION,
                heartbeat_s=self.heartbeat_s,
            )
        )
        receiving = asyncio.create_task(self._take_loads(stream))
        await self.cut.wait()
        receiving.cancel()

    async def _take_loads(self, stream: RegisterServerLink) -> None:
        while True:
            load = await stream.receive()
            assert isinstance(load, WorkerLoad)
            self.loads.put_nowait(load)

    async def serve(self, port: int = 0) -> RpcServer:
        return await RpcServer.start(
            "127.0.0.1",
            port,
            [membership_service(self.handle, cluster_state)],
            TIMERS,
            max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
        )


@contextlib.asynccontextmanager
async def registered(address: str, load: object = None) -> AsyncIterator[asyncio.Task[None]]:
    make = load if callable(load) else make_load
    registration = Registration(address, make_hello("w"), make, TIMERS, Random(1))
    task = asyncio.create_task(registration.run())
    try:
        async with asyncio.timeout(SOON_S):
            yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_router_that_comes_back_is_joined_again() -> None:
    registry = Registry()
    server = await registry.serve()
    port = int(server.address.rpartition(":")[2])
    async with registered(server.address):
        first = await registry.hellos.get()
        await registry.loads.get()
        await server.close()
        server = await registry.serve(port)
        assert await registry.hellos.get() == first
        await registry.loads.get()
    await server.close()


async def test_router_that_is_not_there_yet_is_waited_for() -> None:
    registry = Registry()
    server = await registry.serve()
    port = int(server.address.rpartition(":")[2])
    await server.close()
    async with registered(server.address):
        await asyncio.sleep(0.1)
        server = await registry.serve(port)
        await registry.hellos.get()
    await server.close()


async def test_load_that_cannot_be_told_once_does_not_end_the_registration() -> None:
    registry, num_calls = Registry(), 0
    server = await registry.serve()

    def load() -> WorkerLoad:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("a bug")
        return make_load()

    with structlog.testing.capture_logs() as logs:
        async with registered(server.address, load):
            await registry.hellos.get()
            await registry.hellos.get()
            await registry.loads.get()
    assert "registration.crashed" in [entry["event"] for entry in logs]
    await server.close()


async def test_router_that_asks_for_no_pause_gets_no_flood() -> None:
    registry = Registry(heartbeat_s=0.0)
    server = await registry.serve()
    async with registered(server.address):
        await registry.loads.get()
        await asyncio.sleep(0.3)
        assert registry.loads.qsize() < 60
    await server.close()


async def test_load_that_changed_is_reported_before_the_next_heartbeat() -> None:
    registry = Registry(heartbeat_s=3600.0)
    server = await registry.serve()
    registration = Registration(server.address, make_hello("w"), make_load, TIMERS, Random(1))
    task = asyncio.create_task(registration.run())
    async with asyncio.timeout(SOON_S):
        await registry.loads.get()
        registration.report_now()
        await registry.loads.get()
    task.cancel()
    await asyncio.wait([task])
    await server.close()
