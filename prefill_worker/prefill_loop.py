"""The loop that reads prompts: admit, plan, step, settle."""

import asyncio
import dataclasses
from collections.abc import Callable

import structlog

from kvtransfer.sender import HandoffSender, SenderTable
from kvtransfer.session import Event
from pdserve.domain.errors import Reason
from pdserve.domain.ids import HandoffId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import (
    HandoffFailed,
    HandoffRefused,
    PrefillDone,
    PrefillToDecode,
    Role,
    WorkerLoad,
)
from pdserve.domain.overlap import Overlap
from pdserve.domain.tokens import Failed
from pdserve.domain.waiting import Discipline
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.contract import Drawn, Engine, OnLayers, StepBatch
from pdserve.engine.isolation import run_step
from pdserve.engine.live_steps import LiveStepTimes
from pdserve.engine.ranks.ranked_kv import RankedKv
from pdserve.engine.step_table import StepTable
from pdserve.observe.watch import NO_PREFILL_WATCH, PrefillWatch
from pdserve.rpc.streams import PrefillServerLink, send_or_abort
from prefill_worker.batching import chunk_step, plan_chunks
from prefill_worker.queue import PrefillQueue, PrefillRequest

log = structlog.get_logger(__name__)

Clock = Callable[[], float]

_NUM_PART_MESSAGES = 4  # about how often a prompt's last chunk is told of before it is done


class PrefillLoop:
    """Owns the queue, the active prompts and, through `senders`, every block that is offered.

    A request is in one place at a time: in the queue, active (blocks reserved, being read), or
    only in `senders` (read; its blocks wait to be pulled).

    A chunk of at most `parts_above_bytes` of KV travels sooner without messages about its layers.
    """

    parts_above_bytes = 1 << 20

    def __init__(
        self,
        engine: Engine,
        pool: BlockPool,
        *,
        coefficients: StepCoefficients,
        max_step_tokens: int,
        max_num_active: int,
        max_num_queued: int,
        discipline: Discipline,
        lease_s: float,
        overlap: Overlap = "layers",
        clock: Clock,
        watch: PrefillWatch = NO_PREFILL_WATCH,
    ) -> None:
        self.queue = PrefillQueue(discipline, max_num_queued)
        self.senders: SenderTable[PrefillServerLink] = SenderTable(on_end=self._handoff_ended)
        self._engine = engine
        self._pool = pool
        self.step_times = LiveStepTimes(coefficients, clock)
        self._max_step_tokens = max_step_tokens
        self._max_num_active = max_num_active
        self._lease_s = lease_s
        self._overlap = overlap
        self._clock = clock
        self._watch = watch
        self._active: list[PrefillRequest] = []
        self._to_offer: dict[PrefillRequest, None] = {}  # in this order, each once
        self._has_offers = asyncio.Event()
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._num_steps = 0
        self._num_tokens = 0

    @property
    def is_idle(self) -> bool:
        """Nothing waits, is read or is offered."""
        return not (len(self.queue) or self._active or len(self.senders))

    async def wait_idle(self) -> None:
        """Until nothing waits, is read or is offered."""
        while not self.is_idle:
            self._idle.clear()
            await self._idle.wait()

    def load(self, sequence: int, *, is_draining: bool) -> WorkerLoad:
        return WorkerLoad(
            sequence=sequence,
            num_waiting=len(self.queue),
            num_running=len(self._active),
            waiting_prompt_tokens=self.queue.num_tokens
            + sum(request.num_tokens_left for request in self._active),
            running_context_tokens=sum(request.num_computed_tokens for request in self._active),
            kv=self._pool.usage(),
            is_draining=is_draining,
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            prefill_steps=self.step_times.prefill_steps(),
            decode_steps=self.step_times.decode_steps(),
        )

    def drain_time_s(self) -> float:
        """How long what waits will take to read: the retry advice of a refusal."""
        coefficients, live = self.step_times.coefficients, self.step_times.prefill_steps()
        slowness = (live.slowness(coefficients) if live else None) or 1.0
        return slowness * coefficients.prefill_s(0, self.queue.num_tokens, self._max_step_tokens)

    def submit(self, request: PrefillRequest) -> bool:
        """Queue a request; False when the queue is full."""
        is_queued = self.queue.push(request.key, request)
        self._work.set()
        return is_queued

    def end(self, peer: PrefillServerLink, handoff: HandoffId) -> bool:
        """The decode worker needs nothing more of this handoff; False if nothing was left of it."""
        self._work.set()
        if self.queue.remove((peer, handoff)) is None:
            return self.senders.end(peer, handoff, Event.END)
        self.senders.remember(peer, handoff)
        return True

    def fail(
        self, peer: PrefillServerLink, handoff: HandoffId, reason: Reason, message: str
    ) -> None:
        """End a handoff that cannot go on, and say so: else its owner waits for its deadline."""
        self.senders.end(peer, handoff, Event.FAIL)
        failure = Failed(reason=reason, message=message)
        self.tell(peer, HandoffFailed(handoff=handoff, failure=failure))
        self._work.set()

    def tell(self, peer: PrefillServerLink, message: PrefillToDecode) -> None:
        """Send a message; a peer that is too far behind loses its stream, and all it asked for."""
        if not send_or_abort(peer, message):
            self.end_peer(peer)

    def refuse(self, peer: PrefillServerLink, handoff: HandoffId, failure: Failed) -> None:
        """Turn down a handoff that nothing was reserved for."""
        self.senders.remember(peer, handoff)
        self._watch.refused(failure.reason)
        self.tell(peer, HandoffRefused(handoff=handoff, failure=failure))

    def end_peer(self, peer: PrefillServerLink) -> None:
        """The stream is gone: forget all it asked for."""
        for request in [request for request in self.queue if request.peer is peer]:
            self.queue.remove(request.key)
        self.senders.end_peer(peer)
        self._work.set()

    def _handoff_ended(self, sender: HandoffSender) -> None:
        fields = dataclasses.asdict(sender.handoff)
        log.debug("handoff.ended", role=Role.PREFILL, phase=sender.phase.name, **fields)
        self._watch.handoff_ended(sender.phase.name.lower())

    async def run(self) -> None:
        """Read prompts, and offer their blocks, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._offer_all())
            while True:
                self._expire()
                self._active = [request for request in self._active if not _is_over(request)]
                self._admit()
                plan = plan_chunks(self._active, self._max_step_tokens)
                if plan:
                    await self._step(plan)
                else:
                    await self._wait_for_work()

    def _expire(self) -> None:
        now_s = self._clock()
        for request in [request for request in self.queue if request.leave_by_s <= now_s]:
            self.queue.remove(request.key)
            waited_s = now_s - request.arrived_s
            failure = Failed(
                reason=Reason.QUEUE_TIMEOUT,
                message=f"the prompt waited {waited_s:.1f} s in the prefill queue",
                retry_after_s=self.drain_time_s(),
            )
            self.refuse(request.peer, request.handoff, failure)
        for peer, handoff in self.senders.expire(now_s):
            log.warning("lease.expired", request_id=handoff.request_id, attempt=handoff.attempt)
            self.fail(peer, handoff, Reason.TRANSFER_FAILED, "the lease on the blocks ran out")

    def _admit(self) -> None:
        """Reserve blocks for those whose turn it is; the first that does not fit waits."""
        while len(self._active) < self._max_num_active and (request := self.queue.peek()):
            block_size = self._engine.spec.layout.block_size
            num_blocks = self._engine.spec.layout.num_blocks_for(request.num_tokens)
            # The last token is always computed, for its logits.
            reusable = request.names[: (request.num_tokens - 1) // block_size]
            table = self._pool.reserve(num_blocks, reusable)
            if table is None:
                return
            self.queue.remove(request.key)
            table.hold(table.num_cached_blocks, num_blocks - table.num_cached_blocks)
            now_s = self._clock()
            request.table = StepTable(table, self._work.set)
            request.sender = HandoffSender(
                request.start,
                block_table=request.table,
                memory=self._engine.kv,
                block_size=block_size,
                lease_s=self._lease_s,
                now_s=now_s,
            )
            self.senders.add(request.peer, request.sender)
            request.started_s = now_s
            request.num_cached_tokens = table.num_cached_blocks * block_size
            request.num_computed_tokens = request.num_cached_tokens
            self._watch.prefix_found(request.num_cached_tokens)
            self._active.append(request)
            self._offer(request)

    async def _step(self, plan: list[tuple[PrefillRequest, int]]) -> None:
        sequences = tuple(chunk_step(request, count) for request, count in plan)
        batch = StepBatch(sequences, self._on_layers(plan))
        tables = [request.table for request, _ in plan if request.table is not None]
        for table in tables:
            table.enter_step()
        try:
            result = await run_step(self._engine, batch, self._watch)
        finally:
            for table in tables:
                table.leave_step()
        if not result.is_lost:
            self._num_steps += 1
            self.step_times.note(batch.shape(), result.elapsed_s)
            self._watch.step_done(
                result.elapsed_s,
                num_requests=len(plan),
                num_prompt_tokens=sum(count for _, count in plan),
                num_output_tokens=result.num_tokens,
            )
        for (request, count), drawn in zip(plan, result.sampled, strict=True):
            self._num_tokens += count
            await self._settle(request, count, drawn)

    def _on_layers(self, plan: list[tuple[PrefillRequest, int]]) -> OnLayers | None:
        """What lets go, layer by layer, the blocks of prompts that this step ends.

        None if there are none, their peers read whole blocks, or nobody here knows of all layers.
        """
        layout = self._engine.spec.layout
        is_whole = not isinstance(self._engine.kv, RankedKv)
        if self._overlap != "layers" or layout.num_parts == 1 or not is_whole:
            return None
        forming = [
            (request, request.num_computed_tokens)
            for request, count in plan
            if count == request.num_tokens_left and request.sender and request.sender.reads_parts
            if count * layout.block_bytes > self.parts_above_bytes * layout.block_size
        ]
        if not forming:
            return None
        loop = asyncio.get_running_loop()
        part_layers = len(layout.layers) // layout.num_parts
        stride = -(-layout.num_parts // _NUM_PART_MESSAGES)

        def on_layers(num_layers: int) -> None:  # in the engine's thread
            num_parts, rest = divmod(num_layers, part_layers)
            if rest == 0 and (num_parts % stride == 0 or num_parts == layout.num_parts):
                loop.call_soon_threadsafe(self._form, forming, num_parts)

        return on_layers

    def _form(self, forming: list[tuple[PrefillRequest, int]], num_ready_parts: int) -> None:
        """Say which parts of blocks are final, while the step that fills them goes on.

        With each prompt comes where its last chunk starts.
        """
        for request, start in forming:
            if request.sender is not None and not _is_over(request):
                message = request.sender.form(start, num_ready_parts)
                if message is not None:
                    self.tell(request.peer, message)

    async def _settle(self, request: PrefillRequest, count: int, drawn: Drawn | None) -> None:
        if _is_over(request):
            return
        if isinstance(drawn, Failed):
            self.fail(request.peer, request.handoff, drawn.reason, drawn.message)
            return
        assert request.table is not None
        assert request.sender is not None
        request.num_computed_tokens += count
        block_size = self._engine.spec.layout.block_size
        if drawn is not None and request.sender.sampled():
            now_s = self._clock()
            done = PrefillDone(
                handoff=request.handoff,
                first_token=drawn,
                queue_s=request.started_s - request.arrived_s,
                prefill_s=now_s - request.started_s,
                cached_tokens=request.num_cached_tokens,
            )
            # First, so that the client has it before the last blocks are even described.
            self.tell(request.peer, done)
            self._watch.prompt_read(done.queue_s, done.prefill_s)
            self._active.remove(request)
        self._offer(request)
        await request.table.publish(request.names[: request.num_computed_tokens // block_size])

    def _offer(self, request: PrefillRequest) -> None:
        if self._overlap == "none" and request.num_tokens_left:
            return
        self._to_offer[request] = None
        self._has_offers.set()

    async def _offer_all(self) -> None:
        """Digest and offer what was read, while the engine steps on."""
        while True:
            await self._has_offers.wait()
            self._has_offers.clear()
            while self._to_offer:
                request = next(iter(self._to_offer))
                del self._to_offer[request]
                if not _is_over(request):
                    await self._offer_read(request)

    async def _offer_read(self, request: PrefillRequest) -> None:
        """Offer what was read of one prompt; what is much takes several offers."""
        table, sender = request.table, request.sender
        assert table is not None
        assert sender is not None
        table.enter_step()  # an end does not give away what is being digested
        try:
            while True:
                is_last = request.num_tokens_left == 0
                offer = await sender.offer(request.num_computed_tokens, is_last=is_last)
                if offer is None:
                    return
                self.tell(request.peer, offer)
        finally:
            table.leave_step()

    async def _wait_for_work(self) -> None:
        """Until something arrives, ends, or runs out of time."""
        ends_s = [request.leave_by_s for request in self.queue]
        if (lease_s := self.senders.next_expiry_s()) is not None:
            ends_s.append(lease_s)
        if self.is_idle:
            self._idle.set()
        self._work.clear()
        wait_s = max(0.0, min(ends_s) - self._clock()) if ends_s else None
        try:
            async with asyncio.timeout(wait_s):
                await self._work.wait()
        except TimeoutError:
            return


def _is_over(request: PrefillRequest) -> bool:
    return request.sender is not None and request.sender.is_over
