"""A worker's side of membership: stay registered with every router, and report the load."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import structlog

from pdserve.config.timers import Timers
from pdserve.domain.errors import Reason, WorkerLost
from pdserve.domain.messages import WorkerHello, WorkerLoad
from pdserve.rpc.streams import RegisterLink, receive_hello

log = structlog.get_logger(__name__)

FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 0.5
MIN_HEARTBEAT_S = 0.01  # whatever the router asks for

ConnectRouter = Callable[[str, Timers], Awaitable[RegisterLink]]
"""Opens the stream to the router at an address; raises `WorkerLost`."""


class Registration:
    """Keeps one worker registered with one router until cancelled."""

    def __init__(
        self,
        connect: ConnectRouter,
        router_address: str,
        hello: WorkerHello,
        load: Callable[[], WorkerLoad],
        timers: Timers,
        rng: random.Random,
        on_refused: Callable[[str], None] = lambda why: None,
        is_held_elsewhere: "Callable[[Registration], bool]" = lambda _: False,
    ) -> None:
        self._connect = connect
        self._router_address = router_address
        self._hello = hello
        self._load = load
        self._timers = timers
        self._rng = rng
        self._on_refused = on_refused
        self.is_registered = False
        self.has_registered = False
        self.router: tuple[str, int] | None = None
        """Name and epoch of the router that answered last: it may have other addresses."""
        self._is_held_elsewhere = is_held_elsewhere
        self._is_due = asyncio.Event()

    def report_now(self) -> None:
        """Send the load at once: it changed in a way that the router should not learn late."""
        self._is_due.set()

    async def run(self) -> None:
        """Register, report until the router is lost, and start over; never returns."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                if not self._is_held_elsewhere(self) and await self._register():
                    backoff_s = FIRST_BACKOFF_S
            except Exception as error:  # a worker that stops reporting is as good as dead
                log.error("registration.crashed", router=self._router_address, exc_info=error)
            await asyncio.sleep(self._rng.uniform(0, backoff_s))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _register(self) -> bool:
        """One registration, from its connection to its end; returns whether there was one."""
        try:
            link = await self._connect(self._router_address, self._timers)
        except WorkerLost:
            log.debug("router.unreachable", router=self._router_address)
            return False
        try:
            return await self._report(link)
        finally:
            await link.close()

    async def _report(self, link: RegisterLink) -> bool:
        """Say hello, then report; returns whether the router had taken the registration."""
        try:
            await link.send(self._hello)
            reply = await receive_hello(link, self._timers.connect_s)
            self.is_registered = self.has_registered = True
            self.router = (reply.router_id, reply.epoch)
            log.info("router.joined", router_id=reply.router_id, router=self._router_address)
            while True:
                if not link.try_send(self._load()):  # closed, so that it comes back or is dead
                    raise WorkerLost("the router takes no reports")
                self._is_due.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(reply.heartbeat_s, MIN_HEARTBEAT_S)):
                        await self._is_due.wait()
        except WorkerLost as error:
            if error.reason is Reason.INCOMPATIBLE_PEER:
                log.error("router.refused", router=self._router_address, why=error.message)
                self._on_refused(error.message)
            else:
                log.warning("router.lost", router=self._router_address, why=error.message)
        finally:
            was_registered, self.is_registered = self.is_registered, False
        return was_registered
