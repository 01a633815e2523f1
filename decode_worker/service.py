"""One stream for each router: every request it carries is a task of that stream."""

import asyncio
import math

import structlog

from decode_worker.decode_loop import DecodeLoop
from decode_worker.handoff import Handoffs
from decode_worker.intake import Intake
from decode_worker.requests import Clock, DecodeRequest
from decode_worker.stream import Answer, RouterOutbox
from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import BadRequest, LocalFault, PdserveError, PeerFault, Reason, Refused
from pdserve.domain.ids import PROTOCOL_VERSION, RequestId
from pdserve.domain.kv_demand import num_answer_kv_tokens
from pdserve.domain.messages import Cancel, PeerHello, RequestOutput, Submit, WorkerLoad
from pdserve.domain.sampling import check_sampling
from pdserve.domain.tokens import Failed, are_below
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.watch import NO_DECODE_WATCH, DecodeWatch
from pdserve.rpc.off_loop import off_loop
from pdserve.rpc.streams import DecodeServerLink, iterate, receive_hello

log = structlog.get_logger(__name__)


class DecodeService:
    """Owns requests from submission to their one end.

    Whatever ends a request (its last token, a cancel, its deadline, a fault, the loss of the
    router) ends its task, and the task gives back everything on its way out.
    """

    def __init__(
        self,
        *,
        hello: PeerHello,
        spec: EngineSpec,
        tokenizer: Tokenizer,
        pool: BlockPool,
        intake: Intake,
        handoffs: Handoffs,
        decode_loop: DecodeLoop,
        max_local_prefill_tokens: int,
        hello_s: float,
        clock: Clock,
        watch: DecodeWatch = NO_DECODE_WATCH,
    ) -> None:
        self._watch = watch
        self._hello = hello
        self._spec = spec
        self._tokenizer = tokenizer
        self._pool = pool
        self._intake = intake
        self._handoffs = handoffs
        self._decode_loop = decode_loop
        self._max_local_prefill_tokens = max_local_prefill_tokens
        self._hello_s = hello_s
        self._clock = clock
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._streams: set[DecodeServerLink] = set()
        self._no_streams = asyncio.Event()
        self._no_streams.set()
        self.is_draining = False

    def load(self, sequence: int) -> WorkerLoad:
        return WorkerLoad(
            sequence=sequence,
            num_waiting=self._intake.num_waiting,
            num_running=self._num_requests - self._intake.num_waiting,
            waiting_prompt_tokens=self._intake.num_waiting_prompt_tokens
            + self._decode_loop.num_unread_tokens,
            running_context_tokens=self._decode_loop.num_context_tokens,
            kv=self._pool.usage(),
            is_draining=self.is_draining,
            num_steps=self._decode_loop.num_steps,
            num_tokens=self._decode_loop.num_tokens,
            transferred_bytes=self._handoffs.num_bytes,
            num_corrupt_blocks=self._handoffs.num_corrupt_blocks,
            prefill_steps=self._decode_loop.step_times.prefill_steps(),
            decode_steps=self._decode_loop.step_times.decode_steps(),
            kv_paths=self._handoffs.kv_paths(),
        )

    async def wait_idle(self) -> None:
        """Until no request is left."""
        await self._idle.wait()

    async def close(self) -> None:
        """End every router's stream after what is queued; returns once nothing runs any more."""
        await asyncio.gather(*(stream.close() for stream in self._streams))
        await self._no_streams.wait()

    async def handle(self, stream: DecodeServerLink) -> None:
        """Serve one router until its stream ends, and then end all that it had here."""
        self._streams.add(stream)
        self._no_streams.clear()
        try:
            await self._handle(stream)
        finally:
            self._streams.remove(stream)
            if not self._streams:
                self._no_streams.set()

    async def _handle(self, stream: DecodeServerLink) -> None:
        first = await receive_hello(stream, self._hello_s)
        if not isinstance(first, PeerHello) or first.protocol_version != PROTOCOL_VERSION:
            raise PeerFault("protocol versions differ", reason=Reason.INCOMPATIBLE_PEER)
        await stream.send(self._hello)
        log.info("router.linked", router_id=first.peer_id, epoch=first.epoch)
        router = _RouterRequests(self, RouterOutbox(stream))
        try:
            await router.serve(stream)
        finally:
            log.info("router.unlinked", router_id=first.peer_id, epoch=first.epoch)

    async def run(self, submit: Submit, outbox: RouterOutbox) -> None:
        """One request, from here to its end; exactly one ending is sent, unless cancelled."""
        self._num_requests += 1
        self._idle.clear()
        try:
            self._check(submit)
            names = await off_loop(len(submit.prompt_token_ids), self._read_prompt, submit)
            await self._run(self._new_request(submit, outbox, names))
        except Exception as error:  # noqa: BLE001
            if isinstance(error, Refused):
                self._watch.refused(error.reason)
            outbox.add(
                RequestOutput(
                    request_id=submit.request_id,
                    attempt=submit.attempt,
                    first_index=0,
                    end=_failure(submit.request_id, error),
                )
            )
        finally:
            self._num_requests -= 1
            if self._num_requests == 0:
                self._idle.set()

    async def _run(self, request: DecodeRequest) -> None:
        deadline_s = request.submit.deadline_s
        failure: Failed | None = None
        try:
            async with asyncio.timeout(deadline_s) as patience:
                await self._serve(request, self._clock() + deadline_s)
        except Exception as error:  # noqa: BLE001
            late = PdserveError(
                f"the deadline passed after {request.num_output_tokens} tokens",
                reason=Reason.DEADLINE,
            )
            failure = _failure(request.submit.request_id, late if patience.expired() else error)
        if request.is_answered:  # whatever else went wrong came too late
            self._watch.request_done(request.complete(self._hello.peer_id))
        else:
            ended = "the request ended without an answer"
            request.fail(failure or Failed.of(LocalFault(ended)))

    def _check(self, submit: Submit) -> None:
        """Raise what is wrong with it: one bad request must not reach a batch with others."""
        if self.is_draining:
            raise Refused("the decode worker is draining", reason=Reason.DRAINING)
        check_sampling(
            submit.sampling,
            vocab_size=self._spec.vocab_size,
            eos_token_ids=self._spec.eos_token_ids,
        )
        num_tokens = len(submit.prompt_token_ids) + submit.sampling.max_tokens
        if num_tokens > self._spec.max_context_tokens:
            raise BadRequest(
                f"prompt and answer may have {self._spec.max_context_tokens} tokens; "
                f"got {num_tokens}",
                reason=Reason.CONTEXT_TOO_LONG,
            )
        if not submit.prompt_token_ids or not math.isfinite(submit.deadline_s):
            raise BadRequest("a prompt without tokens, or a deadline that is no number")

    def _read_prompt(self, submit: Submit) -> tuple[bytes, ...]:
        """Names of the prompt's full blocks; raises `BadRequest`."""
        if not are_below(submit.prompt_token_ids, self._spec.vocab_size):
            raise BadRequest(f"a token id at or above {self._spec.vocab_size}")
        return self._names(submit)

    def _new_request(
        self, submit: Submit, outbox: RouterOutbox, names: tuple[bytes, ...]
    ) -> DecodeRequest:
        detokenizer = self._tokenizer.detokenizer(
            submit.prompt_token_ids, skip_special_tokens=submit.sampling.skip_special_tokens
        )
        return DecodeRequest(
            submit,
            answer=Answer(
                submit.sampling,
                eos_token_ids=self._spec.eos_token_ids,
                detokenizer=detokenizer,
            ),
            outbox=outbox,
            names=names,
            clock=self._clock,
            length_rule=self._spec.length_rule,
        )

    def _names(self, submit: Submit) -> tuple[bytes, ...]:
        """Of the prompt's full blocks; none if their content may change while others share them."""
        num_prompt_tokens = len(submit.prompt_token_ids)
        num_kv_tokens = num_answer_kv_tokens(num_prompt_tokens, submit.sampling.max_tokens)
        if self._spec.length_rule.is_recomputed(num_prompt_tokens, num_kv_tokens):
            return ()
        return self._spec.block_names(submit.prompt_token_ids)

    async def _serve(self, request: DecodeRequest, expires_at_s: float) -> None:
        try:
            await self._intake.admit(request)
        except Refused as refused:
            self._watch.refused(refused.reason)
            raise
        self._watch.prefix_found(request.num_cached_tokens)
        try:
            if not self._reads_here(request):
                is_read = await self._handoffs.fetch(request, expires_at_s)
                log.debug("prompt.read", request_id=request.submit.request_id, elsewhere=is_read)
            if request.finished.done():
                return
            self._decode_loop.join(request)
            try:
                await request.finished
            finally:
                self._decode_loop.leave(request)
        finally:
            try:
                await self._publish(request)
            finally:
                self._intake.leave(request)

    def _reads_here(self, request: DecodeRequest) -> bool:
        """No prefill worker is offered, or this worker's cache leaves hardly anything to read."""
        num_left = request.num_prompt_tokens - request.num_computed_tokens
        is_mostly_cached = request.num_computed_tokens > 0 and (
            num_left <= self._max_local_prefill_tokens
        )
        return is_mostly_cached or not request.submit.prefill_targets

    async def _publish(self, request: DecodeRequest) -> None:
        """Let later requests find the prompt's blocks that have their KV."""
        assert request.table is not None
        num_blocks = request.num_computed_tokens // self._spec.layout.block_size
        await request.table.publish(request.names[:num_blocks])


def _failure(request_id: RequestId, error: Exception) -> Failed:
    if isinstance(error, PdserveError):
        return Failed.of(error)
    log.error("request.crashed", request_id=request_id, exc_info=error)
    return Failed.of(LocalFault("internal error at the decode worker"))


class _RouterRequests:
    """The requests of one router's stream, by name."""

    def __init__(self, service: DecodeService, outbox: RouterOutbox) -> None:
        self._service = service
        self._outbox = outbox
        self._tasks: dict[RequestId, tuple[int, asyncio.Task[None]]] = {}

    async def serve(self, stream: DecodeServerLink) -> None:
        async with asyncio.TaskGroup() as group:
            async for message in iterate(stream):
                match message:
                    case Submit():
                        self._submit(group, message)
                    case Cancel():
                        self._cancel(message.request_id, message.attempt)
                    case PeerHello():
                        log.warning("peer.violated", peer=stream.peer, why="a second hello")
            for _, task in self._tasks.values():
                task.cancel()

    def _submit(self, group: asyncio.TaskGroup, submit: Submit) -> None:
        known = self._tasks.get(submit.request_id)
        if known is not None and known[0] >= submit.attempt:
            log.warning("submit.dropped", request_id=submit.request_id, attempt=submit.attempt)
            return
        if known is not None:
            known[1].cancel()
        task = group.create_task(self._service.run(submit, self._outbox))
        self._tasks[submit.request_id] = (submit.attempt, task)
        task.add_done_callback(lambda done: self._forget(submit, done))

    def _cancel(self, request_id: RequestId, attempt: int) -> None:
        known = self._tasks.get(request_id)
        if known is not None and known[0] <= attempt:
            known[1].cancel()

    def _forget(self, submit: Submit, task: asyncio.Task[None]) -> None:
        if self._tasks.get(submit.request_id) == (submit.attempt, task):
            del self._tasks[submit.request_id]
