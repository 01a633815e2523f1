import asyncio
from collections.abc import Callable
from random import Random

from pdserve.config.timers import Timers
from pdserve.rpc.registration import Registration
from pdserve.rpc.router_names import RouterRegistrations, resolve_address
from tests.support.waiting import wait_until
from tests.unit.router.builders import make_hello, make_load


async def until(condition: Callable[[], bool]) -> None:
    await wait_until(condition, within_s=10.0, what="the registrations that the name asks for")


class NamedRouters:
    """A name server that the test changes, and registrations that only note their life."""

    def __init__(self) -> None:
        self.found: frozenset[str] | OSError = frozenset()
        self.num_asked = 0
        self.running: dict[str, Noted] = {}

    async def resolve(self, router: str) -> frozenset[str]:
        assert router == "routers:7451"
        self.num_asked += 1
        if isinstance(self.found, OSError):
            raise self.found
        return self.found

    def make(self, address: str) -> Registration:
        return Noted(address, self.running)

    def open(self, *routers: str) -> RouterRegistrations:
        return RouterRegistrations(routers, self.make, resolve=self.resolve, resolve_s=0.001)

    async def asked_again(self) -> None:
        num_before = self.num_asked
        await until(lambda: self.num_asked >= num_before + 2)


class Noted(Registration):
    """Runs until cancelled, known to its test while it runs."""

    def __init__(self, address: str, running: dict[str, "Noted"]) -> None:
        super().__init__(address, make_hello("w"), make_load, Timers(), Random(1))
        self._address, self._running = address, running

    async def run(self) -> None:
        assert self._address not in self._running, "registered twice"
        self._running[self._address] = self
        try:
            await asyncio.Event().wait()
        finally:
            del self._running[self._address]


async def test_all_addresses_of_a_name_are_registered_with_as_they_come() -> None:
    names = NamedRouters()
    registrations = names.open("routers:7451", "127.0.0.1:9")
    names.found = frozenset({"10.0.0.1:7451"})
    await until(lambda: set(names.running) == {"10.0.0.1:7451", "127.0.0.1:9"})
    names.found = frozenset({"10.0.0.1:7451", "10.0.0.2:7451"})
    await until(lambda: len(names.running) == 3)
    assert not registrations.is_registered
    names.running["10.0.0.2:7451"].is_registered = True
    assert registrations.is_registered
    await registrations.close()
    assert names.running == {}


async def test_an_address_that_leaves_the_name_is_kept_while_its_router_holds_the_worker() -> None:
    names = NamedRouters()
    registrations = names.open("routers:7451")
    names.found = frozenset({"10.0.0.1:7451", "10.0.0.2:7451"})
    await until(lambda: len(names.running) == 2)
    names.running["10.0.0.1:7451"].is_registered = True
    names.found = frozenset()
    await until(lambda: set(names.running) == {"10.0.0.1:7451"})
    await names.asked_again()
    assert set(names.running) == {"10.0.0.1:7451"}
    names.running["10.0.0.1:7451"].is_registered = False
    await until(lambda: not names.running)
    await registrations.close()


async def test_a_name_server_that_fails_ends_no_registration() -> None:
    names = NamedRouters()
    registrations = names.open("routers:7451")
    names.found = frozenset({"10.0.0.1:7451"})
    await until(lambda: len(names.running) == 1)
    names.found = OSError("server failure")
    await names.asked_again()
    assert set(names.running) == {"10.0.0.1:7451"}
    await registrations.close()


async def test_the_system_resolves_localhost() -> None:
    assert "127.0.0.1:7451" in await resolve_address("localhost:7451")
