"""Workers that come and go: real registrations, links and dispatcher, virtual time."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from deploy.simulated.virtual_time import VirtualTimeLoop, run_virtual, virtual
from pdserve.config.timers import Timers
from pdserve.domain.errors import PdserveError, PeerFault, Reason
from pdserve.domain.ids import Epoch
from pdserve.domain.messages import Reads, RegisterReply, Role
from pdserve.domain.sampling import SamplingParams
from pdserve.rpc.streams import MemoryStream, memory_stream_pair
from router.cluster_view import Health, Ledger
from router.dispatch import Dispatcher, DispatchLimits
from router.in_flight import InFlight
from router.membership import Membership
from router.policy import least_total_time
from router.registrations import Registrations
from router.requests import Chunk, GenerateCall
from router.slo import SloBook
from tests.unit.router.builders import make_hello, make_load
from tests.unit.router.played_cluster import DONE, ME, HeardEnds, PlayedWorker, settle

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
        self.workers: dict[str, PlayedWorker] = {}
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


@contextlib.asynccontextmanager
async def registering(
    cluster: Cluster, name: str = "d0", **hello: Any
) -> AsyncIterator[tuple[MemoryStream[Any, Any], "asyncio.Task[None]"]]:
    """The worker's end of a registration whose hello was sent, and the router's side of it."""
    worker = PlayedWorker(name, {"address": name, **hello})
    cluster.workers[name] = worker
    ours, theirs = memory_stream_pair("router", name)
    running = asyncio.create_task(worker.run())
    serving = asyncio.create_task(cluster.registrations.serve(theirs))
    try:
        await ours.send(worker.hello)
        yield ours, serving
    finally:
        serving.cancel()
        running.cancel()
        await asyncio.gather(serving, running, return_exceptions=True)


def alive(cluster: Cluster) -> list[str]:
    """The workers that new requests may go to."""
    view = cluster.membership.view(cluster.clock())
    workers = (*view.prefill, *view.decode)
    return [each.hello.worker_id for each in workers if each.health is Health.ALIVE]


async def fault_of(serving: "asyncio.Task[None]") -> PeerFault:
    with pytest.raises(PeerFault) as caught:
        await serving
    return caught.value


@virtual
async def test_a_worker_is_told_who_registered_it_and_how_often_to_report() -> None:
    cluster = Cluster(Random(1))
    async with registering(cluster) as (worker, serving):
        reply = await worker.receive()
        assert reply == RegisterReply(
            router_id=ME.peer_id,
            epoch=ME.epoch,
            protocol_version=ME.protocol_version,
            heartbeat_s=TIMERS.heartbeat_s,
        )
        await settle()
        assert alive(cluster) == ["d0"]
        await worker.close()
        assert (await fault_of(serving)).reason is Reason.WORKER_LOST
        assert alive(cluster) == []


@virtual
async def test_a_decode_worker_needs_an_open_stream_and_a_prefill_worker_has_none() -> None:
    cluster = Cluster(Random(1))
    async with registering(cluster, "p0", role=Role.PREFILL, reads=Reads.OTHERS):
        await settle()
        assert alive(cluster) == ["p0"]
        assert cluster.workers["p0"].stream is None
    async with registering(cluster, "d0") as (_, serving):
        await settle()
        assert alive(cluster) == ["d0"]
        cluster.workers["d0"].is_down = True
        await cluster.workers["d0"].cut()
        await settle()
        assert alive(cluster) == [], "no stream, no requests"
        assert not serving.done(), "it stays registered, and the link is tried again"


@virtual
async def test_the_first_report_must_be_a_hello_and_come_soon() -> None:
    cluster = Cluster(Random(1))
    ours, theirs = memory_stream_pair("router", "d0")
    await ours.send(make_load(sequence=1))
    fault = await fault_of(asyncio.create_task(cluster.registrations.serve(theirs)))
    assert fault.reason is Reason.INCOMPATIBLE_PEER
    started_s = cluster.clock()
    _, theirs = memory_stream_pair("router", "d0")
    fault = await fault_of(asyncio.create_task(cluster.registrations.serve(theirs)))
    assert fault.message == "no hello came"
    assert cluster.clock() - started_s == pytest.approx(TIMERS.connect_s)


@virtual
async def test_an_incompatible_worker_is_told_so_and_never_registered() -> None:
    cluster = Cluster(Random(1))
    async with registering(cluster, protocol_version=ME.protocol_version + 1) as (_, serving):
        assert (await fault_of(serving)).reason is Reason.INCOMPATIBLE_PEER
        assert alive(cluster) == []


@virtual
async def test_a_worker_that_registers_again_replaces_its_earlier_life() -> None:
    cluster = Cluster(Random(1))
    async with registering(cluster) as (_, earlier):
        await settle()
        async with registering(cluster, epoch=Epoch(2)):
            assert (await fault_of(earlier)).reason is Reason.FENCED
            await settle()
            view = cluster.membership.view(cluster.clock())
            assert [each.hello.epoch for each in view.decode] == [2], "the end of the first is its"


@virtual
async def test_a_silent_worker_is_given_up_and_heartbeats_put_that_off() -> None:
    cluster = Cluster(Random(1))
    async with registering(cluster) as (worker, serving):
        started_s = cluster.clock()
        await asyncio.sleep(TIMERS.dead_s - 0.1)
        await worker.send(make_load(sequence=1))
        fault = await fault_of(serving)
        assert fault.message == f"silent for {TIMERS.dead_s:g} s"
        assert cluster.clock() - started_s == pytest.approx(2 * TIMERS.dead_s - 0.1)
        assert alive(cluster) == []


@virtual
async def test_a_router_that_was_stopped_for_a_while_gives_nobody_up_for_it() -> None:
    cluster = Cluster(Random(1))
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    async with registering(cluster) as (_, serving):
        await settle()
        loop.block(2 * TIMERS.dead_s)
        await settle()
        assert not serving.done(), "what it sent meanwhile is still on its way"
        fault = await fault_of(serving)
        assert fault.message.startswith("silent for"), "true silence ends it all the same"


@virtual
async def test_a_second_hello_changes_nothing() -> None:
    cluster = Cluster(Random(1))
    async with registering(cluster) as (worker, serving):
        await settle()
        await worker.send(make_hello("d0", epoch=Epoch(7)))
        await worker.send(make_load(sequence=3, num_waiting=4))
        await settle()
        [view] = cluster.membership.view(cluster.clock()).decode
        assert (view.hello.epoch, view.load.num_waiting) == (1, 4)
        assert not serving.done()
