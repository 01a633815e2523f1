"""The loop that makes tokens: continuous batching, one engine step at a time.

An engine that looks ahead is given the next step while one is under way, before its tokens are
known: rows of the next step follow them. So the engine never waits for this loop. A row turns out
to be in vain if the token before it ended the answer; what it gives is not looked at, and its KV is
in blocks that stay the request's until the step is over.
"""

import asyncio
from dataclasses import dataclass

import structlog

from decode_worker.batching import NOTHING, Plan, awaited_of, plan_step, sequence_step
from decode_worker.requests import Clock, DecodeRequest
from pdserve.domain.errors import PdserveError
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.tokens import Failed
from pdserve.engine.contract import Drawn, Engine, StepBatch, StepResult
from pdserve.engine.isolation import run_step, tell_of_failed_rows
from pdserve.engine.live_steps import LiveStepTimes
from pdserve.observe.watch import NO_DECODE_WATCH, DecodeWatch

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    """A step that the engine was given."""

    plan: Plan
    batch: StepBatch
    running: asyncio.Task[StepResult | Exception]


class DecodeLoop:
    """Computes every joined request until it leaves. Requests join and leave between steps."""

    def __init__(
        self,
        engine: Engine,
        *,
        coefficients: StepCoefficients,
        max_step_tokens: int,
        clock: Clock,
        watch: DecodeWatch = NO_DECODE_WATCH,
    ) -> None:
        self._engine = engine
        self._looks_ahead = engine.looks_ahead
        self._watch = watch
        self._max_step_tokens = max_step_tokens
        self._clock = clock
        self._running: dict[DecodeRequest, None] = {}
        self._joined = asyncio.Event()
        self.step_times = LiveStepTimes(coefficients, clock)
        self.num_steps = 0
        self.num_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_context_tokens(self) -> int:
        return sum(request.num_computed_tokens for request in self._running)

    @property
    def num_unread_tokens(self) -> int:
        """Prompt tokens that are still to be read here."""
        return sum(
            max(0, request.num_prompt_tokens - request.num_computed_tokens)
            for request in self._running
        )

    def join(self, request: DecodeRequest) -> None:
        """Compute this request from the next step on; its reserved blocks become held."""
        assert request.table is not None
        request.table.hold_rest()
        request.follow_length()
        request.times.joined_s = self._clock()
        self._running[request] = None
        self._joined.set()

    def leave(self, request: DecodeRequest) -> None:
        """Compute no more of this request; safe for one that never joined."""
        self._running.pop(request, None)

    async def run(self) -> None:
        """Step until cancelled."""
        may_look_ahead = True
        while True:
            plan = plan_step(tuple(self._running), self._max_step_tokens)
            if not plan:
                self._joined.clear()
                await self._joined.wait()
            elif may_look_ahead and self._looks_ahead:
                may_look_ahead = await self._step_ahead(plan)
            else:
                await self._step(plan)
                may_look_ahead = True

    async def _step(self, plan: Plan) -> None:
        batch = StepBatch(tuple(sequence_step(request, count) for request, count in plan))
        self._enter(plan)
        try:
            result = await run_step(self._engine, batch, self._watch)
        finally:
            _leave_tables(plan)
        self._settle_step(plan, batch, result)

    async def _step_ahead(self, plan: Plan) -> bool:
        """Step, each time with the next step behind, for as long as there is one.

        False if a step failed. It and the one behind it count for nothing: what they computed is
        computed again, by a step that harms nobody but the guilty (`run_step`).
        """
        batch = StepBatch(tuple(sequence_step(request, count) for request, count in plan))
        try:
            async with asyncio.TaskGroup() as steps:
                current: _UnderWay | None = self._begin(steps, plan, batch)
                while current is not None:
                    behind = self._begin_behind(steps, current)
                    result = await current.running
                    if isinstance(result, Exception):
                        log.error("step.failed", num_requests=len(current.plan), exc_info=result)
                        self._watch.step_failed()
                        return False
                    self._watch.step_launched(result.path)
                    tell_of_failed_rows(result, self._watch)
                    self._settle_step(current.plan, current.batch, result)
                    current = behind
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return True

    def _begin_behind(self, steps: asyncio.TaskGroup, current: _UnderWay) -> _UnderWay | None:
        """The step after `current`, if there is one that needs nothing that the host draws."""
        draws = [each.sample for each in current.batch.sequences if each.sample is not None]
        if not all(draw.is_drawn_on_device for draw in draws):
            return None
        awaited = awaited_of(current.plan, current.batch)
        plan = plan_step(tuple(self._running), self._max_step_tokens, awaited)
        sequences = [
            sequence_step(request, count, awaited.get(request, NOTHING)) for request, count in plan
        ]
        return self._begin(steps, plan, StepBatch(tuple(sequences))) if plan else None

    def _begin(self, steps: asyncio.TaskGroup, plan: Plan, batch: StepBatch) -> _UnderWay:
        self._enter(plan)
        running = steps.create_task(self._attempt(batch))
        running.add_done_callback(lambda _: _leave_tables(plan))
        return _UnderWay(plan=plan, batch=batch, running=running)

    async def _attempt(self, batch: StepBatch) -> StepResult | Exception:
        try:
            return await self._engine.step(batch)
        except Exception as error:  # noqa: BLE001  told by who waits, if anybody needs the step
            return error

    def _enter(self, plan: Plan) -> None:
        """The step uses the blocks of its requests until `_leave_tables`."""
        now_s = self._clock()
        for request, _ in plan:
            assert request.table is not None
            request.table.enter_step()
            request.times.first_step_s = request.times.first_step_s or now_s

    def _settle_step(self, plan: Plan, batch: StepBatch, result: StepResult) -> None:
        if not result.is_lost:
            self.num_steps += 1
            self.step_times.note(batch.shape(), result.elapsed_s)
            self._watch.step_done(
                result.elapsed_s,
                num_requests=len(plan),
                num_prompt_tokens=sum(_num_prompt_tokens(*share) for share in plan),
                num_output_tokens=result.num_tokens,
            )
        for (request, count), drawn in zip(plan, result.sampled, strict=True):
            # It ended during the step; cancelling its task cancels the future at once, the task
            # itself leaves a turn later.
            if request not in self._running or request.finished.done():
                continue
            self._settle(request, count, drawn)
            if request.finished.done():
                self.leave(request)
            elif drawn is not None:
                request.follow_length()

    def _settle(self, request: DecodeRequest, count: int, drawn: Drawn | None) -> None:
        if isinstance(drawn, Failed):
            error = PdserveError(drawn.message, reason=drawn.reason)
            request.finished.set_exception(error)
            return
        request.num_computed_tokens += count
        if drawn is None:
            return
        self.num_tokens += 1
        try:
            request.take(drawn)
        except Exception as error:  # noqa: BLE001  its task logs it; the others go on
            request.finished.set_exception(error)


def _leave_tables(plan: Plan) -> None:
    for request, _ in plan:
        assert request.table is not None
        request.table.leave_step()


def _num_prompt_tokens(request: DecodeRequest, count: int) -> int:
    """How many of the next `count` tokens to compute are of the prompt."""
    return min(count, max(0, request.num_prompt_tokens - request.num_computed_tokens))
