"""A worker stays registered through whatever its router does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from random import Random

import structlog

from pdserve.domain.messages import WorkerLoad
from pdserve.rpc.links import connect_membership
from pdserve.rpc.registration import Registration
from tests.support.registry import TIMERS, Registry
from tests.unit.router.builders import make_hello, make_load

SOON_S = 10.0


@contextlib.asynccontextmanager
async def registered(address: str, load: object = None) -> AsyncIterator[asyncio.Task[None]]:
    make = load if callable(load) else make_load
    registration = Registration(
        connect_membership, address, make_hello("w"), make, TIMERS, Random(1)
    )
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

    async with server:
        with structlog.testing.capture_logs() as logs:
            async with registered(server.address, load):
                await registry.hellos.get()
                await registry.hellos.get()
                await registry.loads.get()
        assert "registration.crashed" in [entry["event"] for entry in logs]


async def test_router_that_asks_for_no_pause_gets_no_flood() -> None:
    registry = Registry(heartbeat_s=0.0)
    server = await registry.serve()
    async with server, registered(server.address):
        await registry.loads.get()
        await asyncio.sleep(0.3)
        assert registry.loads.qsize() < 60


async def test_load_that_changed_is_reported_before_the_next_heartbeat() -> None:
    registry = Registry(heartbeat_s=3600.0)
    server = await registry.serve()
    registration = Registration(
        connect_membership, server.address, make_hello("w"), make_load, TIMERS, Random(1)
    )
    task = asyncio.create_task(registration.run())
    async with asyncio.timeout(SOON_S):
        await registry.loads.get()
        registration.report_now()
        await registry.loads.get()
    task.cancel()
    await asyncio.wait([task])
    await server.close()
