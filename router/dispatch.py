"""The life of one request at the router: taken, placed, relayed, ended once.

enter ─▶ tokenise ─▶ check ─▶ choose + reserve + submit ─▶ relay ─▶ end
                                      ▲                      │
                                      └── worker lost, nothing sent yet
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

import structlog

from pdserve.config.timers import Timers
from pdserve.domain.errors import (
    BadRequest,
    PdserveError,
    PeerFault,
    Reason,
    Refused,
)
from pdserve.domain.ids import AttemptId, RequestId
from pdserve.domain.messages import PrefillTarget, RequestOutput, Submit
from pdserve.domain.tokens import Completed, Failed, Finished, PhaseTimeline, Usage
from pdserve.observe.watch import RouterWatch
from router.admission import (
    ServedModel,
    TextLimits,
    check_call,
    check_fit,
    check_label,
    check_num_tokens,
)
from router.cluster_view import Ledger
from router.decode_links import Inbox
from router.failures import (
    blamed_lives,
    error_of,
    interrupted_by_drain,
    no_workers,
    outcome_of,
    shown_to_client,
    slow_consumer,
)
from router.in_flight import InFlight, Outcome
from router.membership import Membership
from router.policy import MIN_RETRY_AFTER_S, NoWorkers, Overloaded, Pair, Policy
from router.prompts import checked_token_ids
from router.rate_limit import RateLimit
from router.records import Record, Visit
from router.requests import Chunk, ChunkSink, GenerateCall
from router.slo import SloBook

log = structlog.get_logger(__name__)

MAX_NUM_BUFFERED_TOKENS = 256
NO_BOUND_OF_TOKENS = TextLimits(max_prompt_chars=2_000_000)
LAST_WORD_S = 1.0
"""Time for the requests that a drain ends to say so."""
SEED_BITS = 53  # survives JSON


class Encode(Protocol):
    """Text to tokens; raises `BadRequest` or `Refused`. Who stops waiting ends the work."""

    async def __call__(self, text: str, *, add_special_tokens: bool) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """The first three turn away new requests only; None or 0: no such limit.

    They are those of a plan, by the rule of its simulation (`pdserve.domain.pair_cost`): the pair
    is chosen, then the request is refused if so many have no first token yet, or if it would wait
    longer at every reader. `rate` is the plan's, too: none of the arrivals that it was made with go
    beyond it.
    """

    max_num_waiting: int | None = None
    max_wait_s: float | None = None
    rate: RateLimit | None = None
    max_num_attempts: int = 3
    text: TextLimits = NO_BOUND_OF_TOKENS
    max_num_buffered_tokens: int = MAX_NUM_BUFFERED_TOKENS


class Dispatcher:
    """Runs requests; every one of them ends by returning `Finished` or raising `PdserveError`."""

    def __init__(
        self,
        *,
        model_name: str,
        membership: Membership,
        ledger: Ledger,
        in_flight: InFlight,
        policy: Policy,
        slo: SloBook,
        watch: RouterWatch,
        encode: Encode,
        timers: Timers,
        limits: DispatchLimits,
        clock: Callable[[], float],
        rng: Random,
    ) -> None:
        self._model_name = model_name
        self._membership = membership
        self._ledger = ledger
        self._in_flight = in_flight
        self._policy = policy
        self._slo = slo
        self._watch = watch
        self._encode = encode
        self._timers = timers
        self._limits = limits
        self._clock = clock
        self._rng = rng
        self._records: dict[str, Record] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def draw_label(self) -> str:
        """A name for a request whose client gave none."""
        return f"{self._rng.getrandbits(128):032x}"

    def served_model(self) -> ServedModel | None:
        return self._membership.served_model(self._model_name)

    async def run(
        self, call: GenerateCall, send: ChunkSink, take_back: Callable[[], None] | None = None
    ) -> Finished:
        """Answer one request through `send`; nothing of it is held anywhere afterwards.

        `take_back` forgets what was sent, where that has not left the process: the request can
        then start again at any time.
        """
        visit = Visit(received_s=self._clock(), reason=Reason.INTERNAL)
        try:
            check_label(call.label)
            visit.promise = self._slo.find(call.slo_class)
            self._in_flight.enter(call.label, visit.received_s)
            visit.has_entered = True
            self._is_idle.clear()
            finished = await self._run_until_deadline(call, send, take_back, visit)
            visit.finished = finished
            visit.outcome, visit.reason = Outcome.COMPLETED, finished.reason
        except asyncio.CancelledError:
            visit.outcome, visit.reason = Outcome.CANCELLED, Reason.CANCELLED
            raise
        except PdserveError as error:
            visit.outcome, visit.reason = outcome_of(error), error.reason
            if isinstance(error, BadRequest):
                visit.promise = None  # nothing was promised to it
            raise
        finally:
            self._end(visit, call.label)
        return finished

    async def drain(self, drain_s: float) -> None:
        """Take nothing new, let what runs end for `drain_s`, then end the rest."""
        self._in_flight.is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._is_idle.wait()
        for record in list(self._records.values()):
            record.stop(interrupted_by_drain(record.num_delivered))
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                await self._is_idle.wait()

    def _end(self, visit: Visit, label: str) -> None:
        """Count a request that ended, however early, and give its place back if it had one."""
        now_s = self._clock()
        if visit.has_entered:
            self._records.pop(label, None)
            self._in_flight.leave(label, visit.outcome, now_s)
            if not len(self._in_flight):
                self._is_idle.set()
            log.info("request.ended", request_id=label, outcome=visit.outcome, reason=visit.reason)
        seen, result = visit.seen(now_s), None
        if visit.promise is not None:
            result = self._slo.count(visit.promise, visit.outcome, seen)
        self._watch.request_ended(visit.end(result, seen))

    async def _run_until_deadline(
        self,
        call: GenerateCall,
        send: ChunkSink,
        take_back: Callable[[], None] | None,
        visit: Visit,
    ) -> Finished:
        budget_s = self._timers.request_s if call.deadline_s is None else call.deadline_s
        record = None
        try:
            async with asyncio.timeout(budget_s) as patience:
                record = Record(
                    request_id=RequestId(f"{call.label}.{self._rng.getrandbits(64):016x}"),
                    label=call.label,
                    received_s=visit.received_s,
                    deadline_s=visit.received_s + budget_s,
                    send=send,
                    take_back=take_back,
                    patience=patience,
                )
                self._records[call.label] = visit.record = record
                await self._prepare(record, call)
                return await self._try_workers(record)
        except TimeoutError:
            if record is not None and record.verdict is not None:
                raise record.verdict from None
            raise PdserveError(
                f"the deadline of {budget_s:.3f} s passed", reason=Reason.DEADLINE
            ) from None

    async def _prepare(self, record: Record, call: GenerateCall) -> None:
        """Check and tokenise; raises `BadRequest` or `Refused`."""
        check_call(call, self._model_name, self._limits.text)
        model = self.served_model()
        if model is None:
            raise no_workers()
        check_fit(call, model, self._limits.text)
        token_ids, field = call.prompt, "token_ids"
        if isinstance(token_ids, str):
            token_ids = await self._encode(token_ids, add_special_tokens=call.add_special_tokens)
            field = "text"
            check_num_tokens(len(token_ids), call.sampling.max_tokens, model, field=field)
        record.token_ids = await checked_token_ids(token_ids, model, field=field)
        seed = call.sampling.seed if call.has_seed else self._rng.getrandbits(SEED_BITS)
        record.sampling = replace(call.sampling, seed=seed)

    async def _try_workers(self, record: Record) -> Finished:
        """Attempt after attempt, each on workers that have not failed this request."""
        fault: PeerFault | None = None
        for attempt in range(1, self._limits.max_num_attempts + 1):
            pair = self._choose(record, fault)
            try:
                return await self._relay(record, attempt, pair)
            except PeerFault as error:
                fault = error
                self._watch.attempt_failed(error.reason)
                log.warning(
                    "attempt.failed",
                    request_id=record.label,
                    attempt=attempt,
                    decode_worker=pair.decode.hello.worker_id,
                    reason=error.reason,
                )
                record.start_again()
                record.failed_lives |= blamed_lives(error, pair)
        assert fault is not None
        raise shown_to_client(fault)

    def _choose(self, record: Record, fault: PeerFault | None) -> Pair:
        limits, is_new = self._limits, fault is None
        max_wait_s = self._timers.queue_s
        if is_new and limits.max_wait_s:
            max_wait_s = min(max_wait_s, limits.max_wait_s)
        choice = self._policy.choose(
            self._membership.view(self._clock()),
            record.shape,
            excluded=frozenset(record.failed_lives),
            max_wait_s=max_wait_s,
        )
        match choice:
            case NoWorkers():
                raise no_workers() if fault is None else shown_to_client(fault)
            case Overloaded():
                raise Refused(
                    f"requests would wait longer than {max_wait_s:g} s",
                    retry_after_s=choice.retry_after_s,
                )
        num_waiting = self._ledger.num_unread
        if is_new and limits.max_num_waiting and num_waiting >= limits.max_num_waiting:
            raise Refused(
                f"{num_waiting} requests wait for their first token; the limit is "
                f"{limits.max_num_waiting}",
                retry_after_s=max(choice.wait_s, MIN_RETRY_AFTER_S),
            )
        if is_new and limits.rate is not None:
            self._take_within(limits.rate)
        return choice

    def _take_within(self, limit: RateLimit) -> None:
        """Count a request that no other limit refuses."""
        now_s = self._clock()
        if wait_s := limit.wait_s(now_s):
            raise Refused(
                f"requests come faster than the limit of {limit.rate:g} a second",
                retry_after_s=max(wait_s, MIN_RETRY_AFTER_S),
            )
        limit.take(now_s)

    async def _relay(self, record: Record, attempt: int, pair: Pair) -> Finished:
        """One attempt: reserve and submit at once, then pass on what comes.

        Raises `PeerFault` where another pair may do better. The reservation and the place at the
        worker never outlive the call.
        """
        attempt_id = AttemptId(record.request_id, attempt)
        link = self._membership.link(pair.decode.life)  # no await since the choice
        inbox = Inbox(
            max_answer_tokens=record.sampling.max_tokens,
            max_num_tokens=self._limits.max_num_buffered_tokens,
            watch=lambda output: self._account(attempt_id, output),
            on_overflow=lambda: record.stop(slow_consumer(self._limits.max_num_buffered_tokens)),
        )
        self._ledger.assign(
            attempt_id,
            record.shape,
            decode=pair.decode.hello.worker_id,
            reader=pair.reader.hello.worker_id,
            block_size=pair.decode.hello.block_size,
        )
        try:
            record.submitted_s = self._clock()
            link.submit(self._submit_message(record, attempt, pair), inbox)
            while True:
                output = await inbox.take()
                await self._pass_on(record, output)
                if isinstance(output.end, Completed):
                    return self._finish(record, attempt, output.end)
                if isinstance(output.end, Failed):
                    raise error_of(output.end)
        finally:
            link.leave(attempt_id)
            self._ledger.release(attempt_id)

    def _submit_message(self, record: Record, attempt: int, pair: Pair) -> Submit:
        return Submit(
            request_id=record.request_id,
            attempt=attempt,
            prompt_token_ids=record.token_ids,
            sampling=record.sampling,
            deadline_s=max(record.deadline_s - self._clock(), 0.0),
            prefill_targets=tuple(
                PrefillTarget(
                    worker_id=target.hello.worker_id,
                    address=target.hello.address,
                    epoch=target.hello.epoch,
                )
                for target in pair.prefill_targets
            ),
        )

    def _account(self, attempt_id: AttemptId, output: RequestOutput) -> None:
        """Workers free what they hold when they say so, however slowly the client reads."""
        if output.end is not None:
            self._ledger.release(attempt_id)
        elif output.tokens:
            self._ledger.hear(attempt_id, len(output.tokens))

    async def _pass_on(self, record: Record, output: RequestOutput) -> None:
        if not output.tokens and not output.text:
            return
        chunk = Chunk(first_index=record.num_delivered, tokens=output.tokens, text=output.text)
        # Counted before it is sent: what may have reached the client is never sent again.
        record.num_delivered += len(output.tokens)
        await record.send(chunk)
        record.last_token_s = self._clock()
        if record.first_token_s is None:
            record.first_token_s = record.last_token_s

    def _finish(self, record: Record, attempt: int, end: Completed) -> Finished:
        now_s = self._clock()
        timeline: PhaseTimeline = replace(
            end.timeline,
            router_queue_s=record.submitted_s - record.received_s,
            ttft_s=(record.first_token_s or now_s) - record.received_s,
            total_s=now_s - record.received_s,
            attempts=attempt,
        )
        usage = Usage(
            prompt_tokens=len(record.token_ids),
            completion_tokens=record.num_delivered,
            cached_prompt_tokens=end.cached_prompt_tokens,
            seed=record.sampling.seed,
        )
        return Finished(reason=end.reason, usage=usage, timeline=timeline)
