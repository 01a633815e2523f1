"""Real prefill and decode workers joined in memory: what a cluster does, without processes.

    test ── router end ══ DecodeService, DecodeLoop ══ wire ══ PrefillService, PrefillLoop
                                 ▲                                    │
                                 └───────────── PairTransport ────────┘

The workers are built by the product's own builders; only the router's side is the
test's. All run on whatever event loop the test uses; on a virtual one timed engines take no time.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from decode_worker.building import open_decode_worker
from kvtransfer.transports.base import MayRead, OnRead, ignore
from kvtransfer.transports.divided import num_parts_of
from kvtransfer.transports.memory import MemoryRegionServer, MemoryTransport
from pdserve.config.processes import CoefficientSettings, EngineSettings, WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.engine_spec import EngineSpec
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
    Role,
    StartHandoff,
    StepOutputs,
    Submit,
)
from pdserve.domain.overlap import Overlap
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed, Failed, SampledToken
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore
from pdserve.engine.model_files import ModelFiles, resolve_model_dir
from pdserve.engine.timed_engine import TimedEngine
from pdserve.engine.tokenizer import Tokenizer
from pdserve.rpc.memory_network import MemoryNetwork, Wire, serve_like_grpc
from pdserve.rpc.streams import MemoryStream, PrefillLink, iterate, memory_stream_pair
from pdserve.worker.parts import WorkerParts
from prefill_worker.building import open_prefill_worker
from tests.support.kv_handoff import anyone
from tests.support.timed_oracle import timed_tokens

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


_SPARE_ENGINES: dict[tuple[int, int], list[TimedEngine]] = {}


def steps_of(fixed_s: float) -> StepCoefficients:
    """Steps that take `fixed_s`, and what tokens add to it."""
    return replace(COEFFICIENTS, fixed_s=fixed_s)


def borrow_engine(
    num_blocks: int, coefficients: StepCoefficients = COEFFICIENTS, block_size: int = BLOCK_SIZE
) -> TimedEngine:
    """An engine for one event loop; close it. Its KV is whatever the last user left there."""
    spare = _SPARE_ENGINES.setdefault((num_blocks, block_size), [])
    engine = spare.pop() if spare else _open_engine(num_blocks, block_size)
    engine.coefficients = coefficients
    engine._free_at_s = 0.0  # a time of its last event loop
    engine.kv.thread_above_bytes = KvMemory.thread_above_bytes  # its last user may have changed it
    return engine


class SpareEngine(TimedEngine):
    """Used again by other tests: its memory takes longer to make than a test."""

    def close(self) -> None:
        sizes = (self.kv.num_blocks, self.kv.layout.block_size)
        _SPARE_ENGINES.setdefault(sizes, []).append(self)


def _open_engine(num_blocks: int, block_size: int = BLOCK_SIZE) -> TimedEngine:
    return SpareEngine(
        demo_files(),
        block_size=block_size,
        num_blocks=num_blocks,
        coefficients=COEFFICIENTS,
        layout=replace(LAYOUT, block_size=block_size),
    )


@cache
def timed_spec() -> EngineSpec:
    engine = _open_engine(1)
    engine.close()
    return engine.spec


def oracle(prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
    """What a request is answered by workers that make no mistake, stops left out of account."""
    return timed_tokens(prompt, sampling.max_tokens, spec=timed_spec(), params=sampling)


class PairTransport(MemoryTransport):
    """Also damages blocks: `is_corrupt` is asked for each. Without `asks` nobody is asked whether
    a block may be read, as in shm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_corrupt: Callable[[], bool] = lambda: False
        self.asks = True
        self.num_reads = 0
        self.num_reads_of_parts = 0
        self._registered: list[KvStore] = []

    async def register(self, memory: KvStore) -> None:
        self._registered.append(memory)

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> MemoryRegionServer:
        async def may(block_ids: Sequence[BlockId]) -> bool:
            return not self.asks or await may_read(block_ids)

        return await super().serve(memory, may, on_read)

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        assert memory in self._registered, "read into memory that is not registered"
        self.num_reads += 1
        self.num_reads_of_parts += num_parts_of(region) > 1
        await super().read(region, remote_blocks, memory, local_blocks)
        for block in local_blocks:
            if self.is_corrupt():
                assert isinstance(memory, KvMemory)
                memory.block(block)[0] ^= 1


class PrefillNode:
    """One life of one prefill worker."""

    def __init__(self, name: str, epoch: int, pair: "WorkerPair") -> None:
        self.name = name
        self.epoch = Epoch(epoch)
        self.is_alive = True
        self._pair = pair
        self._stack = contextlib.AsyncExitStack()

    @property
    def target(self) -> PrefillTarget:
        return PrefillTarget(worker_id=WorkerId(self.name), address=self.name, epoch=self.epoch)

    @property
    def wires(self) -> list[Wire]:
        return self._pair.network.wires[self.name]

    async def start(self) -> None:
        pair = self._pair
        parts = pair.parts(Role.PREFILL, self.name, self.epoch)
        self.engine = parts.engine
        self._stack.callback(self.engine.close)
        self.worker = await self._stack.enter_async_context(
            open_prefill_worker(parts, [pair.transport])
        )
        self.service, self.loop, self.pool = (
            self.worker.service,
            self.worker.loop,
            self.worker.pool,
        )
        self.loop.parts_above_bytes = pair.sizes.parts_above_bytes
        pair.network.listen(self.name, self.service.handle)

    def cut(self) -> None:
        """Lose every stream; the worker lives on."""
        self._pair.network.cut(self.name)

    async def kill(self) -> None:
        """As SIGKILL: nothing is said, the memory is gone. Harmless when called again."""
        if not self.is_alive:
            return
        self.is_alive = False
        self._pair.network.leave(self.name)
        await self._stack.aclose()

    def raise_faults(self) -> None:
        """What no worker may do, whatever its peers say: stop by itself."""
        if self.is_alive and self.worker.work.done():
            self.worker.work.result()
            raise AssertionError(f"{self.name} stopped reading")

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

    def connect(self) -> MemoryStream[Any, Any]:
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
    prefill_block_sizes: tuple[int, ...] = (BLOCK_SIZE,)  # of the prefill workers in turn
    decode_blocks: int = 64
    max_step_tokens: int = 8
    max_num_requests: int = 8
    max_num_waiting: int = 16
    max_local_prefill_tokens: int = 4
    reuses_prefixes: bool = True
    overlap: Overlap = "layers"
    parts_above_bytes: int = 0  # the blocks of tests are small
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
        timers: Timers | None = None,
        delay_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.sizes = sizes or Sizes()
        self.timers = timers or Timers()
        self.network = MemoryNetwork(delay_s)
        self.transport = PairTransport()
        self.prefill: list[PrefillNode] = []
        self.scripted: dict[str, ScriptedPrefill] = {}
        self.calls: dict[tuple[RequestId, int], Call] = {}
        self._epoch = 0
        self._stack = contextlib.AsyncExitStack()

    def parts(self, role: Role, name: str, epoch: Epoch) -> WorkerParts:
        sizes = self.sizes
        coefficients = sizes.prefill_steps if role is Role.PREFILL else sizes.decode_steps
        num_blocks = sizes.prefill_blocks if role is Role.PREFILL else sizes.decode_blocks
        block_size = BLOCK_SIZE
        if role is Role.PREFILL:
            place = int(name.rpartition("-")[2])
            block_size = sizes.prefill_block_sizes[place % len(sizes.prefill_block_sizes)]
        settings = WorkerSettings(
            worker_id=name,
            role=role,
            engine=EngineSettings(
                engine="timed",
                block_size=block_size,
                num_blocks=num_blocks,
                prefix_reuse=sizes.reuses_prefixes,
                coefficients=CoefficientSettings(**dataclasses.asdict(coefficients)),
            ),
            max_step_tokens=sizes.max_step_tokens,
            max_num_requests=sizes.max_num_requests,
            max_num_queued=sizes.max_num_waiting,
            max_local_prefill_tokens=sizes.max_local_prefill_tokens,
            overlap=sizes.overlap,
            timers=self.timers,
        )
        return WorkerParts(
            settings=settings,
            engine=borrow_engine(num_blocks, coefficients, block_size),
            coefficients=coefficients,
            epoch=epoch,
            clock=asyncio.get_running_loop().time,
        )

    async def __aenter__(self) -> "WorkerPair":
        await self._stack.enter_async_context(self.network)
        for index in range(self.sizes.num_prefill):
            self.prefill.append(await self._start_prefill(f"prefill-{index}"))
        parts = self.parts(Role.DECODE, "decode-0", Epoch(1))
        self.engine: Any = parts.engine  # a `TimedEngine`, unless a subclass has others
        self._stack.callback(parts.engine.close)
        self.worker = await self._stack.enter_async_context(
            open_decode_worker(
                parts, [self.transport], tokenizer=demo_tokenizer(), connect=self._connect
            )
        )
        self.links, self.pool, self.intake = self.worker.links, self.worker.pool, self.worker.intake
        self.handoffs, self.decode_loop = self.worker.handoffs, self.worker.loop
        self.service = self.worker.service
        await self.link_router()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self.assert_quiet()
        self.router.abort()
        await asyncio.wait([self._serving, self._collecting])
        for node in self.prefill:
            await node.kill()
        await self._stack.aclose()
        for peer in self.scripted.values():
            peer.engine.close()
        if kind is None:
            self._collecting.result()

    async def link_router(self) -> None:
        """A router links, as after the loss of its stream; it knows nothing of what was before."""
        self.router, served = memory_stream_pair("router", "decode-0")
        self._serving = asyncio.create_task(
            serve_like_grpc(self.service.handle, served, self.router)
        )
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
        server = await self.transport.serve(engine.kv, anyone)
        self.scripted[name] = ScriptedPrefill(name, engine, server.region)
        return self.scripted[name]

    async def assert_quiet(self, within_s: float = 30.0) -> None:
        """Nothing is held anywhere, at once or within the longest lease."""
        for _ in range(int(within_s / 0.1)):
            if self.is_idle():
                break
            await asyncio.sleep(0.1)
        assert self.is_idle(), self.holdings()
        assert not self.worker.work.done(), "the decode worker stopped decoding"
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

    async def _connect(self, address: str, timers: Timers) -> PrefillLink:
        if address in self.scripted:
            return self.scripted[address].connect()
        return await self.network.connect(address)

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
        layout=timed_spec().sharded_layout,
        regions=regions,
    )
