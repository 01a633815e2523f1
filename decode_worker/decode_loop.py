"""The loop that makes tokens: continuous batching, one engine step at a time."""

import asyncio

from decode_worker.batching import plan_step, sequence_step
from decode_worker.requests import Clock, DecodeRequest
from pdserve.domain.errors import PdserveError
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.tokens import Failed
from pdserve.engine.contract import Drawn, Engine, StepBatch
from pdserve.engine.isolation import run_step
from pdserve.engine.live_steps import LiveStepTimes
from pdserve.observe.watch import NO_DECODE_WATCH, DecodeWatch


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
        while True:
            plan = plan_step(tuple(self._running), self._max_step_tokens)
            if plan:
                await self._step(plan)
            else:
                self._joined.clear()
                await self._joined.wait()

    async def _step(self, plan: list[tuple[DecodeRequest, int]]) -> None:
        batch = StepBatch(tuple(sequence_step(request, count) for request, count in plan))
        tables = [request.table for request, _ in plan if request.table is not None]
        for table in tables:
            table.enter_step()
        now_s = self._clock()
        for request, _ in plan:
            request.times.first_step_s = request.times.first_step_s or now_s
        try:
            result = await run_step(self._engine, batch, self._watch)
        finally:
            for table in tables:
                table.leave_step()
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


def _num_prompt_tokens(request: DecodeRequest, count: int) -> int:
    """How many of the next `count` tokens to compute are of the prompt."""
    return min(count, max(0, request.num_prompt_tokens - request.num_computed_tokens))
