"""A worker finds its routers by name, registers with all of them, and ends where none takes it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from random import Random

import pytest
import structlog

from pdserve.config.processes import RouterSettings
from pdserve.domain.addresses import join_address, split_address
from pdserve.domain.errors import LocalFault, PeerFault, Reason
from pdserve.rpc.links import connect_membership
from pdserve.rpc.registration import MAX_BACKOFF_S
from pdserve.rpc.router_names import RouterRegistrations, resolve_address
from router.app import open_router
from tests.support.registry import TIMERS, Registry
from tests.support.waiting import wait_until
from tests.unit.router.builders import make_hello, make_load


async def until(condition: Callable[[], bool]) -> None:
    await wait_until(condition, within_s=10.0, what="the registrations that the name asks for")


class Names:
    """A name server that the test changes."""

    def __init__(self) -> None:
        self.found: frozenset[str] | OSError = frozenset()
        self.num_asked = 0

    async def resolve(self, router: str) -> frozenset[str]:
        assert router == "routers:7451"
        self.num_asked += 1
        if isinstance(self.found, OSError):
            raise self.found
        return self.found

    async def asked_again(self) -> None:
        num_before = self.num_asked
        await until(lambda: self.num_asked >= num_before + 2)

    @contextlib.asynccontextmanager
    async def registered(self, *more: str) -> AsyncIterator[RouterRegistrations]:
        registrations = RouterRegistrations(
            ("routers:7451", *more),
            make_hello("w"),
            make_load,
            TIMERS,
            Random(1),
            connect=connect_membership,
            resolve=self.resolve,
            resolve_s=0.001,
        )
        try:
            yield registrations
        finally:
            await registrations.close()


@contextlib.asynccontextmanager
async def routers(num: int) -> AsyncIterator[list[tuple[Registry, str]]]:
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for _ in range(num):
            registry = Registry()
            server = await registry.serve()
            stack.push_async_callback(server.close)
            found.append((registry, server.address))
        yield found


async def test_all_addresses_of_a_name_are_registered_with_as_they_come() -> None:
    names = Names()
    async with routers(3) as ((a, at_a), (b, at_b), (c, at_c)):
        async with names.registered(at_c) as registrations:
            await until(lambda: c.num_registered == 1)
            assert registrations.is_registered
            names.found = frozenset({at_a})
            await until(lambda: a.num_registered == 1)
            names.found = frozenset({at_a, at_b})
            await until(lambda: b.num_registered == 1)
            await names.asked_again()
            assert (a.num_registered, b.num_registered, c.num_registered) == (1, 1, 1)
        await until(lambda: a.num_registered + b.num_registered + c.num_registered == 0)


async def test_an_address_that_leaves_the_name_is_kept_while_its_router_holds_the_worker() -> None:
    names = Names()
    async with routers(1) as ((router, address),), names.registered() as registrations:
        names.found = frozenset({address})
        await until(lambda: router.num_registered == 1)
        names.found = frozenset()
        await names.asked_again()
        assert router.num_registered == 1, "it may be draining: its last answers come from here"
        router.cut.set()
        await until(lambda: not registrations.is_registered)
        num_hellos = router.hellos.qsize()
        await names.asked_again()
        assert router.hellos.qsize() <= num_hellos + 1, "it is gone: nobody registers again"


async def test_a_name_server_that_fails_ends_no_registration() -> None:
    names = Names()
    async with routers(1) as ((router, address),), names.registered() as registrations:
        names.found = frozenset({address})
        await until(lambda: router.num_registered == 1)
        names.found = OSError("server failure")
        await names.asked_again()
        assert registrations.is_registered
        router.cut.set()
        await until(lambda: router.hellos.qsize() >= 2)  # the address is still tried


async def test_a_worker_that_no_router_would_have_says_why() -> None:
    names = Names()
    async with routers(1) as ((router, address),), names.registered(address) as registrations:
        router.refusal = PeerFault("protocol must be 9", reason=Reason.INCOMPATIBLE_PEER)
        with pytest.raises(LocalFault, match=r"protocol must be 9: .* must be of one version"):
            async with asyncio.timeout(10):
                await registrations.refused


async def test_a_worker_that_one_router_has_stays_whatever_another_says() -> None:
    names = Names()
    async with routers(2) as ((old, at_old), (new, at_new)):
        old.refusal = PeerFault("protocol must be 9", reason=Reason.INCOMPATIBLE_PEER)
        async with names.registered(at_new) as registrations:
            await until(lambda: new.num_registered == 1)
            names.found = frozenset({at_old})
            await until(lambda: old.hellos.qsize() >= 2)  # refused at least once
            assert not registrations.refused.done()
            assert registrations.is_registered


async def test_the_system_resolves_localhost() -> None:
    assert "127.0.0.1:7451" in await resolve_address("localhost:7451")


async def test_router_with_two_addresses_is_registered_with_once() -> None:
    """As `localhost` may be 127.0.0.1 and ::1; each registration would end the other."""
    names = Names()
    settings = RouterSettings(
        host="::", insecure=True, port=0, internal_port=0, metrics_port=None, timers=TIMERS
    )
    with structlog.testing.capture_logs() as logs:
        async with open_router(settings) as served, names.registered() as registrations:
            port = split_address(served.internal.address)[1]
            names.found = frozenset({join_address(host, port) for host in ("127.0.0.1", "::1")})
            await until(lambda: registrations.is_registered)
            # Long enough for either to have come back many times.
            until_s = time.monotonic() + 4 * MAX_BACKOFF_S
            await until(lambda: time.monotonic() > until_s)
            assert registrations.is_registered
    num_registered = sum(entry["event"] == "worker.registered" for entry in logs)
    assert num_registered <= 2, num_registered
