"""Requests that come while workers go: real registrations, links and dispatcher, virtual time."""

import asyncio
import contextlib
from collections import Counter
from random import Random
from typing import Any

import pytest

from deploy.simulated.virtual_time import run_virtual
from pdserve.config.timers import Timers
from pdserve.domain.errors import PdserveError, PeerFault, Reason
from pdserve.domain.ids import Epoch
from pdserve.domain.sampling import SamplingParams
from pdserve.rpc.streams import MemoryStream, memory_stream_pair
from router.cluster_view import Ledger
from router.dispatch import Dispatcher, DispatchLimits
from router.in_flight import InFlight
from router.membership import Membership
from router.policy import least_total_time
from router.registrations import Registrations
from router.requests import Chunk, GenerateCall
from router.slo import SloBook
from tests.unit.router.builders import make_load
from tests.unit.router.played_cluster import DONE, ME, HeardEnds, PlayedWorker

TIMERS = Timers(heartbeat_s=0.5, suspect_s=1.5, dead_s=3.0)
NUM_TURNS = 60
SAID_TO_CLIENTS = {Reason.NO_WORKERS, Reason.WORKER_LOST}


class AnsweringWorker(PlayedWorker):
    """Answers each request at once, with one token; registers like a process."""

    def _take(self, message: Any) -> None:
        super()._take(message)
        for submit in list(self.open.values()):
            self.say(submit, 0, 1, DONE)


class Cluster:
    """A router's parts, and workers that come, go silent and come again."""

    def __init__(self, rng: Random) -> None:
        self.clock = asyncio.get_running_loop().time
        self.ledger = Ledger()
        self.in_flight = InFlight(max_num_requests=100)
        self.membership = Membership(timers=TIMERS, ledger=self.ledger)
        self.workers: dict[str, AnsweringWorker] = {}
        self.registrations = Registrations(
            self.membership,
            me=ME,
            connect=self._connect,
            timers=TIMERS,
            clock=self.clock,
            rng=rng,
        )
        self.dispatcher = Dispatcher(
            model_name="demo",
            membership=self.membership,
            ledger=self.ledger,
            in_flight=self.in_flight,
            policy=least_total_time,
            slo=SloBook(()),
            watch=HeardEnds(),
            encode=self._encode,
            timers=TIMERS,
            limits=DispatchLimits(),
            clock=self.clock,
            rng=rng,
        )

    async def live(self, name: str, epoch: int, ends: "Counter[str]") -> None:
        """One registration: heartbeats, then silence; asks at each turn as it is given up."""
        worker = AnsweringWorker(name, {"address": name, "epoch": Epoch(epoch)})
        self.workers[name] = worker
        ours: MemoryStream[Any, Any]
        theirs: MemoryStream[Any, Any]
        ours, theirs = memory_stream_pair("router", name)
        running = asyncio.create_task(worker.run())
        serving = asyncio.create_task(self.registrations.serve(theirs))
        try:
            await ours.send(worker.hello)
            for sequence in range(1, 4):
                await asyncio.sleep(TIMERS.heartbeat_s)
                await ours.send(make_load(sequence=sequence))
                ends[await self.ask()] += 1
            await asyncio.sleep(0)
            states = self.membership.worker_states(self.clock())
            [member] = [state for state in states if state.hello.worker_id == name]
            await asyncio.sleep(TIMERS.dead_s - member.silence_s)
            for _ in range(NUM_TURNS):
                ends[await self.ask()] += 1
                await asyncio.sleep(0)
            with contextlib.suppress(PeerFault):
                await serving
        finally:
            serving.cancel()
            running.cancel()
            await asyncio.gather(serving, running, return_exceptions=True)

    async def ask(self) -> str:
        async def ignore(chunk: Chunk) -> None:
            return

        call = GenerateCall(
            prompt=(1, 2, 3),
            sampling=SamplingParams(max_tokens=1),
            label=self.dispatcher.draw_label(),
        )
        try:
            await self.dispatcher.run(call, ignore)
        except PdserveError as error:
            return error.reason
        except Exception as error:  # noqa: BLE001
            return repr(error)
        return "ok"

    async def _connect(self, address: str, timers: Timers) -> MemoryStream[Any, Any]:
        return await self.workers[address].connect(address, timers)

    async def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(text.encode())


@pytest.mark.parametrize("seed", range(20))
def test_worker_that_goes_silent_and_comes_back_costs_no_request_an_internal_error(
    seed: int,
) -> None:
    async def run() -> "Counter[str]":
        cluster, ends = Cluster(Random(seed)), Counter[str]()
        for epoch in range(1, 4):
            await cluster.live("d0", epoch, ends)
        assert cluster.ledger.is_empty
        return ends

    ends = run_virtual(run(), seed=seed)
    assert ends["ok"] > 0, (seed, ends)
    assert set(ends) <= {"ok", *SAID_TO_CLIENTS}, (seed, ends)
