"""A worker's side of membership: stay registered with every router, and report the load."""

import asyncio
import random
from collections.abc import Callable

import structlog

from pdserve.config.timers import Timers
from pdserve.domain.errors import WorkerLost
from pdserve.domain.messages import WorkerHello, WorkerLoad
from pdserve.rpc.links import RegisterLink, connect_membership

log = structlog.get_logger(__name__)

FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 0.5


class Registration:
    """Keeps one worker registered with one router until cancelled."""

    def __init__(
        self,
        router_address: str,
        hello: WorkerHello,
        load: Callable[[], WorkerLoad],
        timers: Timers,
        rng: random.Random,
    ) -> None:
        self._router_address = router_address
        self._hello = hello
        self._load = load
        self._timers = timers
        self._rng = rng

    async def run(self) -> None:
        """Register, report until the router is lost, and start over; never returns."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                link = await connect_membership(self._router_address, self._timers)
            except WorkerLost:
                log.debug("router.unreachable", router=self._router_address)
            else:
                try:
                    if await self._report(link):
                        backoff_s = FIRST_BACKOFF_S
                finally:
                    await link.close()
            await asyncio.sleep(self._rng.uniform(0, backoff_s))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _report(self, link: RegisterLink) -> bool:
        """Say hello, then report; returns whether the router had taken the registration."""
        is_registered = False
        try:
            await link.send(self._hello)
            async with asyncio.timeout(self._timers.connect_s):
                reply = await link.receive()
            is_registered = True
            log.info("router.joined", router_id=reply.router_id, router=self._router_address)
            while True:
                await link.send(self._load())
                await asyncio.sleep(reply.heartbeat_s)
        except (WorkerLost, TimeoutError) as error:
            log.warning("router.lost", router=self._router_address, why=str(error))
        return is_registered
