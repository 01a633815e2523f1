"""Real prefill and decode workers joined in memory: what a cluster does, without processes.

    test ── router end ══ DecodeService, DecodeLoop ══ wire ══ PrefillService, PrefillLoop
                                 ▲                                    │
                                 └───────────── PairTransport ────────┘

Everything but the streams and the transport is the code that serves. Both run on whatever event
loop the test uses; on a virtual one the timed engines take no time.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

from decode_worker.decode_loop import DecodeLoop
from decode_worker.handoff import Handoffs
from decode_worker.intake import Intake
from decode_worker.prefill_links import PrefillLinks
from decode_worker.service import DecodeService
from kvtransfer.transports.base import MayRead, OnRead, check_read, ignore
from pdserve.config.timers import Timers
from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import PeerFault, TransferFailed, WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, BlockId, Epoch, RequestId, WorkerId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.domain.messages import (
    BlocksOffered,
    Cancel,
    HandoffHello,
    PeerHello,
    PrefillDone,
    PrefillTarget,
    RemoteRegion,
    RequestOutput,
    StartHandoff,
    StepOutputs,
    Submit,
)
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed, Failed, SampledToken
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore
from pdserve.engine.model_files import ModelFiles, resolve_model_dir
from pdserve.engine.timed_engine import TimedEngine, timed_tokens
from pdserve.engine.tokenizer import Tokenizer
from pdserve.rpc.streams import MemoryStream, PrefillLink, iterate, memory_stream_pair
from prefill_worker.prefill_loop import PrefillLoop
from prefill_worker.service import PrefillService

T = TypeVar("T")

BLOCK_SIZE = 4
LAYOUT = KvLayout(
    layers=(LayerKv(1, 2, 2), LayerKv(1, 2, 2)),
    block_size=BLOCK_SIZE,
    dtype="float32",
    item_bytes=4,
)
COEFFICIENTS = StepCoefficients(
    fixed_s=0.01,
    prefill_token_s=0.001,
    prefill_attention_s=0.0,
    decode_token_s=0.001,
    decode_context_token_s=0.0,
)


@cache
def demo_files() -> ModelFiles:
    return ModelFiles.open("demo")


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model_dir("demo"))


_SPARE_ENGINES: dict[int, list[TimedEngine]] = {}


def steps_of(fixed_s: float) -> StepCoefficients:
    """Steps that take `fixed_s`, and what tokens add to it."""
    return replace(COEFFICIENTS, fixed_s=fixed_s)


def borrow_engine(num_blocks: int, coefficients: StepCoefficients = COEFFICIENTS) -> TimedEngine:
    """An engine for one event loop; give it back. Its KV is whatever the last user left there."""
    spare = _SPARE_ENGINES.setdefault(num_blocks, [])
    engine = spare.pop() if spare else _open_engine(num_blocks)
    engine.coefficients = coefficients
    engine._free_at_s = 0.0  # a time of its last event loop
    return engine


def give_back(engine: TimedEngine) -> None:
    _SPARE_ENGINES[engine.kv.num_blocks].append(engine)


def _open_engine(num_blocks: int) -> TimedEngine:
    return TimedEngine(
        demo_files(),
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        coefficients=COEFFICIENTS,
        layout=LAYOUT,
    )


@cache
def timed_spec() -> EngineSpec:
    engine = _open_engine(1)
    engine.close()
    return engine.spec


def oracle(prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
    """What a request is answered by workers that make no mistake, stops left out of account."""
    return timed_tokens(prompt, sampling.max_tokens, spec=timed_spec(), params=sampling)


class PairTransport:
    """Reads the memory of another worker of this process, block by block.

    `pause_s` is asked for the time before each block, and `is_corrupt` whether to damage it. With
    `asks` the serving side's `may_read` decides, as in tcp; else nobody does, as in shm.
    """

    name = "pair"

    def __init__(self) -> None:
        self.pause_s: Callable[[], float] = lambda: 0.0
        self.is_corrupt: Callable[[], bool] = lambda: False
        self.asks = True
        self.num_reads = 0
        self._num_served = 0
        self._registered: list[KvStore] = []
        self._served: dict[str, tuple[KvMemory, MayRead]] = {}

    async def register(self, memory: KvStore) -> None:
        self._registered.append(memory)

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> "PairServer":
        assert isinstance(memory, KvMemory)
        self._num_served += 1
        place = str(self._num_served)
        self._served[place] = (memory, may_read)
        region = RemoteRegion(
            transport=self.name,
            address={"place": place},
            num_blocks=memory.num_blocks,
            block_bytes=memory.layout.block_bytes,
        )
        return PairServer(region, self)

    def forget(self, region: RemoteRegion) -> None:
        self._served.pop(region.address["place"], None)

    def can_reach(self, region: RemoteRegion) -> bool:
        return region.transport == self.name

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        check_read(region, remote_blocks, memory, local_blocks)
        assert isinstance(memory, KvMemory)
        assert memory in self._registered, "read into memory that is not registered"
        self.num_reads += 1
        for remote, local in zip(remote_blocks, local_blocks, strict=True):
            await asyncio.sleep(self.pause_s())
            served = self._served.get(region.address["place"])
            if served is None:
                raise TransferFailed("the peer is gone")
            source, may_read = served
            if self.asks and not may_read([remote]):
                raise TransferFailed("not on offer")
            memory.block(local)[:] = source.block(remote)
            if self.is_corrupt():
                memory.block(local)[0] ^= 1

    async def close_peer(self, region: RemoteRegion) -> None: ...

    async def close(self) -> None: ...


class PairServer:
    sees_reads = True

    def __init__(self, region: RemoteRegion, transport: PairTransport) -> None:
        self.region = region
        self._transport = transport

    async def close(self) -> None:
        self._transport.forget(self.region)


class Wire:
    """A stream between two ends that takes `delay_s()` a message, can stall and can be cut.

    Like a connection it loses nothing in the middle: whatever comes, comes in order.
    """

    def __init__(self, left: str, right: str, delay_s: Callable[[], float]) -> None:
        self.left, left_inner = memory_stream_pair(left, right)
        self.right, right_inner = memory_stream_pair(right, left)
        self.flows = asyncio.Event()
        self.flows.set()
        self._delay_s = delay_s
        self._inner = (left_inner, right_inner)

    async def run(self) -> None:
        left, right = self._inner
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.carry(left, right))
            tasks.create_task(self.carry(right, left))

    def cut(self) -> None:
        for end in (self.left, self.right, *self._inner):
            end.abort()

    async def carry(self, source: MemoryStream[Any, Any], target: MemoryStream[Any, Any]) -> None:
        async for message in iterate(source):
            await self.flows.wait()
            await asyncio.sleep(self._delay_s())
            target.try_send(message)
        self.cut()


class PrefillNode:
    """One life of one prefill worker."""

    def __init__(self, name: str, epoch: int, pair: "WorkerPair") -> None:
        clock = asyncio.get_running_loop().time
        sizes, timers = pair.sizes, pair.timers
        self.name = name
        self.epoch = Epoch(epoch)
        self.engine = borrow_engine(sizes.prefill_blocks, sizes.prefill_steps)
        self.pool = BlockPool(sizes.prefill_blocks, reuse_prefixes=sizes.reuses_prefixes)
        self.loop = PrefillLoop(
            self.engine,
            self.pool,
            coefficients=sizes.prefill_steps,
            max_step_tokens=sizes.max_step_tokens,
            max_num_active=sizes.max_num_requests,
            max_num_waiting=sizes.max_num_waiting,
            lease_s=timers.lease_s,
            clock=clock,
        )
        self.wires: list[Wire] = []
        self.is_alive = True
        self.service: PrefillService
        self._pair = pair
        self._clock = clock
        self._server: PairServer
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def target(self) -> PrefillTarget:
        return PrefillTarget(worker_id=WorkerId(self.name), address=self.name, epoch=self.epoch)

    async def start(self) -> None:
        self._server = await self._pair.transport.serve(self.engine.kv, self.loop.senders.may_read)
        hello = hello_of(self.name, self.epoch, (self._server.region,))
        self.service = PrefillService(
            self.loop,
            hello,
            self.engine.spec,
            num_blocks=self.pool.num_blocks,
            queue_s=self._pair.timers.queue_s,
            hello_s=self._pair.timers.connect_s,
            clock=self._clock,
        )
        self._spawn(self.loop.run())

    async def connect(self) -> PrefillLink:
        if not self.is_alive:
            raise WorkerLost(f"{self.name} is dead")
        wire = self._pair.make_wire("decode", self.name)
        self.wires.append(wire)
        self._spawn(wire.run())
        self._spawn(serve_like_grpc(self.service.handle, wire.right))
        return wire.left

    def cut(self) -> None:
        """Lose every stream; the worker lives on."""
        for wire in self.wires:
            wire.cut()
        self.wires.clear()

    async def kill(self) -> None:
        """As SIGKILL: nothing is said, the memory is gone. Harmless when called again."""
        if not self.is_alive:
            return
        self.is_alive = False
        for task in self._tasks:
            task.cancel()
        await self._server.close()
        self.cut()
        await asyncio.wait(self._tasks)
        give_back(self.engine)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def raise_faults(self) -> None:
        """What no worker may do, whatever its peers say: stop by itself."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()
        assert not (self.is_alive and self._tasks[0].done()), f"{self.name} stopped reading"

    def is_idle(self) -> bool:
        return not self.is_alive or (self.loop.is_idle and self.pool.usage().is_idle)


class ScriptedPrefill:
    """A prefill worker that says what the test tells it to; what it computes is right."""

    def __init__(self, name: str, engine: TimedEngine, region: RemoteRegion) -> None:
        self.name = name
        self.engine = engine
        self.region = region
        self.target = PrefillTarget(worker_id=WorkerId(name), address=name, epoch=Epoch(1))
        self.stream: MemoryStream[Any, Any]
        self._is_linked = asyncio.Event()

    def connect(self) -> PrefillLink:
        theirs, self.stream = memory_stream_pair("decode-0", self.name)
        self.stream.try_send(hello_of(self.name, Epoch(1), (self.region,)))
        self._is_linked.set()
        return theirs

    async def hear(self, kind: type[T]) -> T:
        """The next message of this kind; drops others."""
        await self._is_linked.wait()
        while True:
            message = await self.stream.receive()
            if isinstance(message, kind):
                return message

    async def read(self, start: StartHandoff) -> tuple[BlocksOffered, PrefillDone]:
        """Compute the whole prompt; what a correct worker would say of it."""
        num_blocks = LAYOUT.num_blocks_for(len(start.prompt_token_ids))
        block_ids = tuple(BlockId(block) for block in range(num_blocks))
        step = SequenceStep(
            token_ids=start.prompt_token_ids,
            start=0,
            block_table=block_ids,
            sample=SampleStep(params=start.sampling, token_index=0),
        )
        result = await self.engine.step(StepBatch((step,)))
        [token] = result.sampled
        assert isinstance(token, SampledToken)
        offered = range(start.first_block, num_blocks)
        offer = BlocksOffered(
            handoff=start.handoff,
            first_block=start.first_block,
            block_ids=tuple(block_ids[place] for place in offered),
            digests=tuple(
                block_digest(start.handoff, place, self.engine.kv.block(BlockId(place)))
                for place in offered
            ),
        )
        done = PrefillDone(
            handoff=start.handoff,
            first_token=token,
            queue_s=0.0,
            prefill_s=result.elapsed_s,
            cached_tokens=0,
        )
        return offer, done


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the workers are; small enough to get into trouble."""

    num_prefill: int = 1
    prefill_blocks: int = 64
    decode_blocks: int = 64
    max_step_tokens: int = 8
    max_num_requests: int = 8
    max_num_waiting: int = 16
    max_local_prefill_tokens: int = 4
    reuses_prefixes: bool = True
    prefill_steps: StepCoefficients = COEFFICIENTS
    decode_steps: StepCoefficients = COEFFICIENTS


@dataclass(slots=True, eq=False)
class Call:
    """One request as its router sees it."""

    submit: Submit
    tokens: list[SampledToken] = field(default_factory=list)
    text: str = ""
    ends: list[Completed | Failed] = field(default_factory=list)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)

    @property
    def end(self) -> Completed | Failed:
        assert len(self.ends) == 1, self.ends
        return self.ends[0]

    def take(self, output: RequestOutput) -> None:
        assert not self.ends, (self.submit.request_id, "output after the end", output)
        assert output.first_index == len(self.tokens), (self.submit.request_id, output)
        self.tokens += output.tokens
        self.text += output.text
        if self.tokens:
            self.has_begun.set()
        if output.end is not None:
            self.ends.append(output.end)
            self.has_ended.set()

    async def completed(self) -> Completed:
        await self.has_ended.wait()
        assert isinstance(self.end, Completed), self.end
        return self.end

    async def failed(self) -> Failed:
        await self.has_ended.wait()
        assert isinstance(self.end, Failed), self.end
        return self.end


class WorkerPair:
    """One decode worker, its prefill workers and a router that only collects.

    Leaving the block waits until nothing is held any more, and checks it.
    """

    def __init__(
        self,
        sizes: Sizes | None = None,
        *,
        name: str = "decode-0",
        timers: Timers | None = None,
        delay_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.name = name
        self.sizes = sizes or Sizes()
        self.timers = timers or Timers()
        self.delay_s = delay_s
        self.make_wire: Callable[[str, str], Wire] = lambda left, right: Wire(left, right, delay_s)
        self.transport = PairTransport()
        self.prefill: list[PrefillNode] = []
        self.scripted: dict[str, ScriptedPrefill] = {}
        self.calls: dict[tuple[RequestId, int], Call] = {}
        self._epoch = 0
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "WorkerPair":
        sizes, timers = self.sizes, self.timers
        clock = asyncio.get_running_loop().time
        for index in range(sizes.num_prefill):
            self.prefill.append(await self._start_prefill(f"prefill-{index}"))
        self.engine = borrow_engine(sizes.decode_blocks, sizes.decode_steps)
        self._stack.callback(give_back, self.engine)
        self.pool = BlockPool(sizes.decode_blocks, reuse_prefixes=sizes.reuses_prefixes)
        self.links = PrefillLinks(
            self._connect, hello_of(self.name, Epoch(1)), (self.transport,), timers
        )
        await self._stack.enter_async_context(self.links)
        self.decode_loop = DecodeLoop(
            self.engine,
            coefficients=sizes.decode_steps,
            max_step_tokens=sizes.max_step_tokens,
            clock=clock,
        )
        self.intake = Intake(
            self.pool,
            block_size=BLOCK_SIZE,
            max_num_requests=sizes.max_num_requests,
            max_num_waiting=sizes.max_num_waiting,
            queue_s=timers.queue_s,
            clock=clock,
        )
        await self.transport.register(self.engine.kv)
        self.handoffs = Handoffs(
            self.links, self.engine.kv, vocab_size=self.engine.spec.vocab_size, clock=clock
        )
        self.service = DecodeService(
            hello=PeerHello(peer_id=self.name, epoch=Epoch(1), protocol_version=PROTOCOL_VERSION),
            spec=self.engine.spec,
            tokenizer=demo_tokenizer(),
            pool=self.pool,
            intake=self.intake,
            handoffs=self.handoffs,
            decode_loop=self.decode_loop,
            max_local_prefill_tokens=sizes.max_local_prefill_tokens,
            hello_s=timers.connect_s,
            clock=clock,
        )
        self._decoding = asyncio.create_task(self.decode_loop.run())
        await self.link_router()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            await self.assert_quiet()
        self.router.abort()
        await asyncio.wait([self._serving, self._collecting])
        self._decoding.cancel()
        await asyncio.wait([self._decoding])
        await self._stack.aclose()
        for node in self.prefill:
            await node.kill()
        for peer in self.scripted.values():
            give_back(peer.engine)
        if error is None:
            self._collecting.result()

    async def link_router(self) -> None:
        """A router links, as after the loss of its stream; it knows nothing of what was before."""
        self.router, served = memory_stream_pair("router", "decode-0")
        self._serving = asyncio.create_task(serve_like_grpc(self.service.handle, served))
        await self.router.send(
            PeerHello(peer_id="router", epoch=Epoch(1), protocol_version=PROTOCOL_VERSION)
        )
        reply = await self.router.receive()
        assert isinstance(reply, PeerHello)
        self._collecting = asyncio.create_task(self._collect(self.router))

    def submit(
        self,
        prompt: Sequence[int],
        *,
        name: str = "",
        attempt: int = 1,
        deadline_s: float = 60.0,
        targets: Sequence[PrefillTarget] | None = None,
        **sampling: Any,
    ) -> Call:
        """Send a request to the decode worker; by default any prefill worker may read it."""
        submit = Submit(
            request_id=RequestId(name or f"r{len(self.calls)}"),
            attempt=attempt,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),
            deadline_s=deadline_s,
            prefill_targets=tuple(
                [node.target for node in self.prefill] if targets is None else targets
            ),
        )
        call = Call(submit)
        self.calls[submit.request_id, attempt] = call
        is_sent = self.router.try_send(submit)
        assert is_sent
        return call

    def cancel(self, call: Call) -> None:
        submit = call.submit
        del self.calls[submit.request_id, submit.attempt]
        self.router.try_send(Cancel(request_id=submit.request_id, attempt=submit.attempt))

    async def replace_prefill(self, index: int) -> None:
        """Kill a prefill worker and start another in its place, with a new epoch."""
        if not self.prefill[index].is_alive:
            return
        await self.prefill[index].kill()
        self.prefill[index] = await self._start_prefill(self.prefill[index].name)

    async def script_prefill(self, name: str = "scripted") -> "ScriptedPrefill":
        """Add a prefill worker that the test plays."""
        engine = borrow_engine(self.sizes.prefill_blocks)
        server = await self.transport.serve(engine.kv, lambda block_ids: True)
        self.scripted[name] = ScriptedPrefill(name, engine, server.region)
        return self.scripted[name]

    async def assert_quiet(self, within_s: float = 30.0) -> None:
        """Nothing is held anywhere, at once or within the longest lease."""
        for _ in range(int(within_s / 0.1)):
            if self.is_idle():
                break
            await asyncio.sleep(0.1)
        assert self.is_idle(), self.holdings()
        assert not self._decoding.done(), "the decode worker stopped decoding"
        for node in self.prefill:
            node.raise_faults()
        if self._collecting.done():
            self._collecting.result()

    def is_idle(self) -> bool:
        return (
            self.service.load(0).num_running == 0
            and self.intake.num_waiting == 0
            and self.intake.num_admitted == 0
            and self.decode_loop.num_running == 0
            and self.pool.usage().is_idle
            and all(node.is_idle() for node in self.prefill)
        )

    def holdings(self) -> str:
        """Who holds what; asking also checks that all blocks are accounted for."""
        prefill = [(node.name, node.pool.usage(), node.loop.is_idle) for node in self.prefill]
        return f"decode {self.service.load(0)}, prefill {prefill}"

    async def _start_prefill(self, name: str) -> PrefillNode:
        self._epoch += 1
        node = PrefillNode(name, self._epoch, self)
        await node.start()
        return node

    async def _connect(self, address: str) -> PrefillLink:
        await asyncio.sleep(self.delay_s())
        if address in self.scripted:
            return self.scripted[address].connect()
        for node in self.prefill:
            if node.name == address:
                return await node.connect()
        raise WorkerLost(f"nobody at {address}")

    async def _collect(self, router: MemoryStream[Any, Any]) -> None:
        async for message in iterate(router):
            assert isinstance(message, StepOutputs)
            for output in message.outputs:
                call = self.calls.get((output.request_id, output.attempt))
                if call is not None:
                    call.take(output)


def hello_of(name: str, epoch: Epoch, regions: tuple[RemoteRegion, ...] = ()) -> HandoffHello:
    return HandoffHello(
        worker_id=WorkerId(name),
        epoch=epoch,
        protocol_version=PROTOCOL_VERSION,
        model_hash=timed_spec().model_hash,
        layout_hash=LAYOUT.digest(),
        regions=regions,
    )


async def serve_like_grpc(
    handle: Callable[[MemoryStream[Any, Any]], Coroutine[Any, Any, None]],
    stream: MemoryStream[Any, Any],
) -> None:
    """As the gRPC server does: a handler and its stream end together."""
    try:
        await handle(stream)
    except PeerFault:
        return
    finally:
        await stream.close()
