"""A plan's cluster in memory: the real router and the real workers, with timed engines.

    requests ── Dispatcher ══ DecodeService, DecodeLoop ══ PrefillService, PrefillLoop
                     │                  │                            │
                     └── Registrations ═╧════════════ reports ═══════╛

Workers are built from the settings that the plan's deployment gives them, they register by their
own hellos, and report their load with every heartbeat. On a virtual event loop messages take no
time, so that what is left is the time of engine steps.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from random import Random

from deploy.deployment import Deployment
from pdserve.config.processes import RouterSettings, WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.errors import Refused
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import PeerHello, WorkerLoad
from pdserve.domain.sampling import SamplingParams
from pdserve.observe.watch import RouterWatch
from pdserve.rpc.streams import DecodeLink, memory_stream_pair
from pdserve.rpc.worker_process import worker_hello
from router.cluster_view import Ledger
from router.dispatch import Dispatcher, DispatchLimits
from router.in_flight import InFlight
from router.membership import Membership
from router.registrations import Registrations
from router.requests import Chunk, Finished, GenerateCall
from router.slo import SloBook
from tests.support.worker_pair import (
    BLOCK_SIZE,
    PairTransport,
    PrefillNode,
    Sizes,
    WorkerPair,
    serve_like_grpc,
    timed_spec,
)

ME = PeerHello(peer_id="router-0", epoch=Epoch(9), protocol_version=PROTOCOL_VERSION)
FIRST_PROMPT_TOKEN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a trace."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of it; times since it was sent, empty names of one that was refused."""

    reader: str = ""
    writer: str = ""
    ttft_s: float = float("inf")
    total_s: float = float("inf")


class TimedCluster:
    """The workers and the router of a deployment; `run` serves a trace."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.ledger = Ledger()
        self._transport = PairTransport()
        self._tasks = contextlib.AsyncExitStack()
        self._decode: dict[str, WorkerPair] = {}
        self._prefill: list[PrefillNode] = []
        self.dispatcher: Dispatcher
        self._registrations: Registrations

    async def run(self, asks: Sequence[Ask]) -> list[Outcome]:
        """Send each request when its time has come; returns once all have ended."""
        start_s = asyncio.get_running_loop().time()

        async def serve(number: int, ask: Ask) -> Outcome:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(start_s + ask.at_s - loop.time())
            sent_s = loop.time()
            first_s: list[float] = []

            async def take(chunk: Chunk) -> None:
                if chunk.tokens and not first_s:
                    first_s.append(loop.time())

            try:
                finished = await self.dispatcher.run(_call(number, ask), take)
            except Refused:
                return Outcome()
            return _outcome(finished, first_s[0] - sent_s, loop.time() - sent_s)

        return await asyncio.gather(*(serve(number, ask) for number, ask in enumerate(asks)))

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        router = self.deployment.router
        membership = Membership(timers=router.timers, ledger=self.ledger)
        self._registrations = Registrations(
            membership,
            me=ME,
            connect=self._connect_decode,
            timers=router.timers,
            clock=loop.time,
            rng=Random(0),
        )
        self.dispatcher = self._new_dispatcher(router, membership)
        for worker in self.deployment.workers:
            if worker.settings.role == "prefill":
                await self._start_prefill(worker.settings, stack)
            else:
                await self._start_decode(worker.settings, stack)
        await asyncio.sleep(1e-3)  # hellos and links

    def _new_dispatcher(self, router: RouterSettings, membership: Membership) -> Dispatcher:
        return Dispatcher(
            model_name="demo",
            membership=membership,
            ledger=self.ledger,
            in_flight=InFlight(max_num_requests=router.max_num_requests),
            slo=SloBook(()),
            watch=RouterWatch(),
            encode=_no_text,
            timers=router.timers,
            limits=DispatchLimits(
                max_num_waiting=router.max_num_waiting, max_wait_s=router.max_wait_s
            ),
            clock=asyncio.get_running_loop().time,
            rng=Random(0),
        )

    async def _start_prefill(
        self, settings: WorkerSettings, stack: contextlib.AsyncExitStack
    ) -> None:
        node = PrefillNode(settings.worker_id, 1, self._values_for(settings))
        await node.start()
        stack.push_async_callback(node.kill)
        self._prefill.append(node)
        self._register(settings, lambda number: node.loop.load(number, is_draining=False), stack)

    async def _start_decode(
        self, settings: WorkerSettings, stack: contextlib.AsyncExitStack
    ) -> None:
        pair = self._values_for(settings)
        await stack.enter_async_context(pair)
        pair.prefill = self._prefill
        self._decode[settings.worker_id] = pair
        self._register(settings, pair.service.load, stack)

    def _values_for(self, settings: WorkerSettings) -> WorkerPair:
        assert settings.engine.block_size == BLOCK_SIZE, settings.engine.block_size
        sizes = Sizes(
            num_prefill=0,
            prefill_blocks=settings.engine.num_blocks,
            decode_blocks=settings.engine.num_blocks,
            max_step_tokens=settings.max_step_tokens,
            max_num_requests=settings.max_num_requests,
            max_num_waiting=settings.max_num_queued,
            max_local_prefill_tokens=settings.max_local_prefill_tokens,
            reuses_prefixes=settings.engine.prefix_reuse,
            prefill_steps=_coefficients(settings),
            decode_steps=_coefficients(settings),
        )
        pair = WorkerPair(sizes, name=settings.worker_id, timers=settings.timers)
        pair.transport = self._transport
        return pair

    def _register(
        self,
        settings: WorkerSettings,
        load: Callable[[int], WorkerLoad],
        stack: contextlib.AsyncExitStack,
    ) -> None:
        ours, theirs = memory_stream_pair(settings.worker_id, "router")
        hello = worker_hello(
            settings,
            timed_spec(),
            _coefficients(settings),
            epoch=Epoch(1),
            address=settings.worker_id,
        )

        async def report() -> None:
            await ours.send(hello)
            number = 0
            while True:
                number += 1
                await ours.send(load(number))
                await asyncio.sleep(settings.timers.heartbeat_s)

        for work in (serve_like_grpc(self._registrations.serve, theirs), report()):
            stack.push_async_callback(_end, asyncio.create_task(work))

    async def _connect_decode(self, address: str, timers: Timers) -> DecodeLink:
        ours, theirs = memory_stream_pair("router", address)
        serving = asyncio.create_task(serve_like_grpc(self._decode[address].service.handle, theirs))
        self._tasks.push_async_callback(_end, serving)
        return ours

    async def close(self) -> None:
        await self._tasks.aclose()


@contextlib.asynccontextmanager
async def open_timed_cluster(deployment: Deployment) -> AsyncIterator[TimedCluster]:
    """All workers registered and linked; nothing is held anywhere when the block is left."""
    cluster = TimedCluster(deployment)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(cluster.close)
        await cluster.start(stack)
        yield cluster
        assert cluster.ledger.is_empty


def _coefficients(settings: WorkerSettings) -> StepCoefficients:
    assert settings.engine.coefficients is not None, settings.worker_id
    return settings.engine.coefficients.to_coefficients()


def _call(number: int, ask: Ask) -> GenerateCall:
    first = FIRST_PROMPT_TOKEN + number
    return GenerateCall(
        prompt=(first,) * ask.num_prompt_tokens,
        sampling=SamplingParams(max_tokens=ask.num_output_tokens),
        label=f"r{number}",
    )


def _outcome(finished: Finished, ttft_s: float, total_s: float) -> Outcome:
    timeline = finished.timeline
    assert timeline.attempts == 1
    return Outcome(
        reader=timeline.prefill_worker or timeline.decode_worker,
        writer=timeline.decode_worker,
        ttft_s=ttft_s,
        total_s=total_s,
    )


async def _no_text(text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    raise NotImplementedError(text)


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])
