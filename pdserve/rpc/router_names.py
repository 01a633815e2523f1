"""A worker's registrations with all routers behind names: DNS is asked again and again, since
routers come and go."""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Sequence

import structlog

from pdserve.config.timers import Timers
from pdserve.domain.addresses import is_ip, join_address, split_address
from pdserve.domain.errors import LocalFault
from pdserve.domain.messages import WorkerHello, WorkerLoad
from pdserve.rpc.registration import ConnectRouter, Registration

log = structlog.get_logger(__name__)

RESOLVE_S = 1.0
"""A router that has just come waits for its workers this much longer."""

Resolve = Callable[[str], Awaitable[frozenset[str]]]
"""From host:port to all addresses behind the name; raises `OSError` where it has none."""


class RouterRegistrations:
    """Owns one `Registration` for each address of each router name, until closed.

    `refused` fails where a router will never have this worker and none has had it before: most
    likely they are of different versions, and it should end and say so.
    """

    def __init__(
        self,
        routers: Sequence[str],
        hello: WorkerHello,
        load: Callable[[], WorkerLoad],
        timers: Timers,
        rng: random.Random,
        *,
        connect: ConnectRouter,
        resolve: Resolve | None = None,
        resolve_s: float = RESOLVE_S,
    ) -> None:
        self.refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connect = connect
        self._hello = hello
        self._load = load
        self._timers = timers
        self._rng = rng
        self._resolve = resolve if resolve is not None else resolve_address
        self._resolve_s = resolve_s
        self._running: dict[str, tuple[Registration, asyncio.Task[None]]] = {}
        self._watchers = [asyncio.create_task(self._watch(router)) for router in routers]

    @property
    def is_registered(self) -> bool:
        """Whether at least one router has this worker."""
        return any(registration.is_registered for registration, _ in self._running.values())

    def report_now(self) -> None:
        """Have the load reported to every router at once."""
        for registration, _ in self._running.values():
            registration.report_now()

    async def close(self) -> None:
        """End all registrations; routers see their streams end."""
        self.refused.cancel()
        await _cancel(self._watchers)
        await _cancel([task for _, task in self._running.values()])

    async def _watch(self, router: str) -> None:
        if is_ip(split_address(router)[0]):
            self._start(router)
            return
        known: frozenset[str] = frozenset()
        is_failing = False
        while True:
            try:
                found = await self._resolve(router)
                is_failing = False
            except OSError as error:
                found = known  # a name server that is down says nothing about the routers
                if not is_failing:
                    log.warning("router.unresolved", router=router, why=str(error))
                is_failing = True
            for address in sorted(found - known):
                self._start(address)
            known = found | {address for address in known - found if not await self._ended(address)}
            await asyncio.sleep(self._resolve_s)

    def _start(self, address: str) -> None:
        registration = Registration(
            self._connect,
            address,
            self._hello,
            self._load,
            self._timers,
            self._rng,
            on_refused=self._on_refused,
            is_held_elsewhere=self._is_held_elsewhere,
        )
        self._running[address] = (registration, asyncio.create_task(registration.run()))

    def _is_held_elsewhere(self, one: Registration) -> bool:
        """Whether the router at this address has the worker by another: a name may stand for an
        IPv4 and an IPv6 address, and each new registration would end the one before."""
        return any(
            other is not one and other.is_registered and other.router == one.router
            for other, _ in self._running.values()
        )

    def _on_refused(self, why: str) -> None:
        was_registered = any(each.has_registered for each, _ in self._running.values())
        if not self.refused.done() and not was_registered:
            self.refused.set_exception(
                LocalFault(
                    f"{why}: router and workers must be of one version and serve one model; this "
                    f"worker speaks protocol {self._hello.protocol_version}"
                )
            )

    async def _ended(self, address: str) -> bool:
        """End the registration at an address that the name has no more, unless the router still
        holds it: one that drains leaves the name before its last answer."""
        registration, task = self._running[address]
        if registration.is_registered:
            return False
        del self._running[address]
        await _cancel([task])
        return True


async def resolve_address(router: str) -> frozenset[str]:
    """All addresses of host:port, by the system's resolver."""
    host, port = split_address(router)
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    return frozenset(join_address(str(address[0]), port) for *_, address in found)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
