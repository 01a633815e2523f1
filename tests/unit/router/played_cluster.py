"""A dispatcher in memory whose decode workers the test plays; no gRPC, no files."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

from pdserve.config.processes import SloClass
from pdserve.config.timers import Timers
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.messages import Cancel, PeerHello, RequestOutput, StepOutputs, Submit
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed, Failed, FinishReason, PhaseTimeline, SampledToken
from pdserve.observe.watch import RequestEnd, RouterWatch
from pdserve.rpc.streams import MemoryStream, iterate, memory_stream_pair
from router.cluster_view import Ledger
from router.decode_links import DecodeLink
from router.dispatch import Dispatcher, DispatchLimits
from router.in_flight import InFlight
from router.membership import Member, Membership
from router.policy import least_total_time
from router.requests import Chunk, GenerateCall
from router.slo import SloBook
from tests.unit.router.builders import make_hello

TIMERS = Timers(suspect_s=1e6, dead_s=2e6)
ME = PeerHello(peer_id="router-0", epoch=Epoch(9), protocol_version=PROTOCOL_VERSION)
DONE = Completed(reason=FinishReason.LENGTH, cached_prompt_tokens=0, timeline=PhaseTimeline())


async def settle() -> None:
    """Let everything that can run run."""
    for _ in range(30):
        await asyncio.sleep(0)


class PlayedWorker:
    """A decode worker; `open` has what it was asked for and neither ended nor was cancelled."""

    def __init__(self, name: str, hello_changes: Mapping[str, Any]) -> None:
        self.hello = make_hello(name, **hello_changes)
        self.open: dict[tuple[str, int], Submit] = {}
        self.submits: list[Submit] = []
        self.cancels: list[Cancel] = []
        self.is_down = False
        self.stream: MemoryStream[Any, Any] | None = None

    async def connect(self, address: str, timers: Timers) -> MemoryStream[Any, Any]:
        ours, theirs = memory_stream_pair("router", "worker")
        life = PeerHello(
            peer_id=self.hello.worker_id,
            epoch=self.hello.epoch,
            protocol_version=PROTOCOL_VERSION,
        )
        await theirs.send(life)
        self.stream = theirs
        if self.is_down:
            await theirs.close()
        return ours

    async def run(self) -> None:
        """Take messages, over all streams of its life."""
        while True:
            if self.stream is not None:
                async for message in iterate(self.stream):
                    self._take(message)
                self.open.clear()  # a worker cancels what a lost stream carried
            await asyncio.sleep(0)

    def say(self, submit: Submit, index: int, count: int, end: Any = None) -> None:
        output = RequestOutput(
            request_id=submit.request_id,
            attempt=submit.attempt,
            first_index=index,
            tokens=tuple(SampledToken(i) for i in range(index, index + count)),
            end=end,
        )
        assert self.stream is not None
        self.stream.try_send(StepOutputs((output,)))
        if isinstance(end, Completed | Failed):
            self.open.pop((submit.request_id, submit.attempt), None)

    async def cut(self) -> None:
        if self.stream is not None:
            await self.stream.close()

    def _take(self, message: Any) -> None:
        if isinstance(message, Submit):
            self.submits.append(message)
            self.open[message.request_id, message.attempt] = message
        elif isinstance(message, Cancel):
            self.cancels.append(message)
            self.open.pop((message.request_id, message.attempt), None)


def open_link(member: Member) -> DecodeLink:
    """What a registration sets once the stream to a decode worker is open."""
    return DecodeLink(
        member.life,
        member.hello.address,
        me=ME,
        connect=PlayedWorker(member.hello.worker_id, {}).connect,
        timers=TIMERS,
        rng=Random(1),
        on_change=lambda is_open: None,
    )


class HeardEnds(RouterWatch):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.ends: list[RequestEnd] = []
        self.failed_attempts: list[str] = []

    def request_ended(self, end: RequestEnd) -> None:
        self.ends.append(end)

    def attempt_failed(self, reason: str) -> None:
        self.failed_attempts.append(reason)


class PlayedCluster:
    """The dispatcher and what it works on."""

    def __init__(
        self, names: tuple[str, ...], limits: DispatchLimits, hello_changes: Mapping[str, Any]
    ) -> None:
        self.ledger = Ledger()
        self.in_flight = InFlight(max_num_requests=100)
        self.membership = Membership(timers=TIMERS, ledger=self.ledger)
        self.slo = SloBook((SloClass(name="fast", ttft_s=1.0, tpot_s=0.1),))
        self.watch = HeardEnds()
        self.workers = {name: PlayedWorker(name, hello_changes) for name in names}
        self.links: dict[Any, DecodeLink] = {}
        self.received: dict[str, list[int]] = {}
        self.is_client_reading = asyncio.Event()
        self.is_client_reading.set()
        self.dispatcher = Dispatcher(
            model_name="demo",
            membership=self.membership,
            ledger=self.ledger,
            in_flight=self.in_flight,
            policy=least_total_time,
            slo=self.slo,
            watch=self.watch,
            encode=self._encode,
            timers=TIMERS,
            limits=limits,
            clock=asyncio.get_running_loop().time,
            rng=Random(0),
        )

    def start(
        self,
        label: str,
        *,
        max_tokens: int = 8,
        deadline_s: float | None = None,
        can_take_back: bool = False,
        slo_class: str = "",
    ) -> "asyncio.Task[Any]":
        call = GenerateCall(
            prompt=(1, 2, 3),
            sampling=SamplingParams(max_tokens=max_tokens),
            label=label,
            deadline_s=deadline_s,
            slo_class=slo_class,
        )
        received = self.received[label] = []

        async def send(chunk: Chunk) -> None:
            await self.is_client_reading.wait()
            assert chunk.first_index == len(received)
            received.extend(token.token_id for token in chunk.tokens)

        take_back = received.clear if can_take_back else None
        return asyncio.create_task(self.dispatcher.run(call, send, take_back))

    @property
    def is_idle(self) -> bool:
        """Nothing is held, here or at a worker."""
        held = any(worker.open for worker in self.workers.values())
        return self.ledger.is_empty and len(self.in_flight) == 0 and not held

    async def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        await asyncio.sleep(0)
        return tuple(text.encode())


@contextlib.asynccontextmanager
async def open_played_cluster(
    *names: str,
    limits: DispatchLimits | None = None,
    hello_changes: Mapping[str, Any] = MappingProxyType({}),
) -> AsyncIterator[PlayedCluster]:
    """Workers registered and linked; all tasks end with the block."""
    cluster = PlayedCluster(names, limits or DispatchLimits(), hello_changes)
    tasks = []
    for worker in cluster.workers.values():
        member = cluster.membership.admit(worker.hello, 0.0)

        def on_change(is_open: bool, member: Any = member) -> None:
            member.link = cluster.links[member.hello.worker_id] if is_open else None

        link = DecodeLink(
            member.life,
            "",
            me=ME,
            connect=worker.connect,
            timers=TIMERS,
            rng=Random(1),
            on_change=on_change,
        )
        cluster.links[worker.hello.worker_id] = link
        tasks += [asyncio.create_task(link.run()), asyncio.create_task(worker.run())]
    await settle()
    try:
        yield cluster
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
