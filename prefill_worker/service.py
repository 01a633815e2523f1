"""One stream for each decode worker: hello, then handoffs as they come."""

import math

import structlog

from kvtransfer.sender import check_start
from kvtransfer.session import ProtocolViolation
from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import BadRequest, PeerFault, Reason
from pdserve.domain.kv_exchange import exchange_obstacle
from pdserve.domain.messages import (
    BlocksPulled,
    DecodeToPrefill,
    EndHandoff,
    HandoffHello,
    RenewLeases,
    StartHandoff,
    WorkerLoad,
)
from pdserve.domain.sampling import check_sampling
from pdserve.domain.tokens import Failed, are_below
from pdserve.observe.watch import NO_PREFILL_WATCH, PrefillWatch
from pdserve.rpc.off_loop import off_loop
from pdserve.rpc.streams import PrefillServerLink, iterate, receive_hello
from prefill_worker.prefill_loop import Clock, PrefillLoop
from prefill_worker.queue import PrefillRequest

log = structlog.get_logger(__name__)


class PrefillService:
    """Turns messages into calls of the loop. A bad message ends its handoff, never the process."""

    def __init__(
        self,
        loop: PrefillLoop,
        hello: HandoffHello,
        spec: EngineSpec,
        *,
        num_blocks: int,
        queue_s: float,
        hello_s: float,
        clock: Clock,
        watch: PrefillWatch = NO_PREFILL_WATCH,
    ) -> None:
        self._loop = loop
        self._watch = watch
        self._hello = hello
        self._spec = spec
        self._num_blocks = num_blocks
        self._queue_s = queue_s
        self._hello_s = hello_s
        self._clock = clock
        self.is_draining = False

    def load(self, sequence: int) -> WorkerLoad:
        return self._loop.load(sequence, is_draining=self.is_draining)

    async def wait_idle(self) -> None:
        """Until no prompt waits, is read or is offered."""
        await self._loop.wait_idle()

    async def close(self) -> None:
        """Peers of an idle worker have nothing more to hear: all its handoffs have ended."""

    async def handle(self, stream: PrefillServerLink) -> None:
        """Serve one decode worker until its stream ends."""
        first = await receive_hello(stream, self._hello_s)
        if not isinstance(first, HandoffHello):
            raise PeerFault("the first message is no hello", reason=Reason.INCOMPATIBLE_PEER)
        if (obstacle := exchange_obstacle(first, self._hello)) is not None:
            raise PeerFault(obstacle, reason=Reason.INCOMPATIBLE_PEER)
        await stream.send(self._hello)
        log.info("decode_worker.joined", worker_id=first.worker_id, epoch=first.epoch)
        try:
            async for message in iterate(stream):
                await self._take(stream, message)
        finally:
            self._loop.end_peer(stream)
            log.info("decode_worker.left", worker_id=first.worker_id, epoch=first.epoch)

    async def _take(self, stream: PrefillServerLink, message: DecodeToPrefill) -> None:
        senders = self._loop.senders
        match message:
            case StartHandoff():
                await self._start(stream, message)
            case BlocksPulled():
                sender = senders.get(stream, message.handoff)
                try:
                    is_late = sender is None or not sender.pulled(message)
                except ProtocolViolation as violation:
                    self._drop(stream, violation.message)
                    self._loop.fail(
                        stream, message.handoff, Reason.TRANSFER_FAILED, violation.message
                    )
                    return
                if is_late:
                    self._watch.message_dropped("late")
                else:
                    self._watch.blocks_sent(message.num_blocks)
            case RenewLeases():
                now_s = self._clock()
                for handoff in message.handoffs:
                    if sender := senders.get(stream, handoff):
                        sender.renew(now_s)
            case EndHandoff():
                if not self._loop.end(stream, message.handoff):
                    self._watch.message_dropped("late")
            case HandoffHello():
                self._drop(stream, "a second hello")

    def _drop(self, stream: PrefillServerLink, why: str) -> None:
        log.warning("peer.violated", peer=stream.peer, why=why)
        self._watch.message_dropped("violation")

    async def _start(self, stream: PrefillServerLink, start: StartHandoff) -> None:
        key = (stream, start.handoff)
        if key in self._loop.queue or self._loop.senders.is_known(*key):
            self._drop(stream, "a handoff started twice")
            return
        arrived_s = self._clock()
        if (failure := self._refusal(start)) is None:
            try:
                names = await off_loop(len(start.prompt_token_ids), self._read_prompt, start)
            except BadRequest as error:
                self._loop.refuse(stream, start.handoff, Failed.of(error))
                return
            request = PrefillRequest(
                start=start,
                peer=stream,
                arrived_s=arrived_s,
                leave_by_s=arrived_s + min(start.deadline_s, self._queue_s),
                names=names,
            )
            if self._loop.submit(request):
                return
            failure = Failed(
                reason=Reason.OVERLOADED,
                message=f"the prefill queue holds {len(self._loop.queue)} requests",
                retry_after_s=self._loop.drain_time_s(),
            )
        self._loop.refuse(stream, start.handoff, failure)

    def _refusal(self, start: StartHandoff) -> Failed | None:
        """Why this prompt cannot be read here, whatever the load: one bad request must not reach
        a batch with others.
        """
        if self.is_draining:
            return Failed(reason=Reason.DRAINING, message="the prefill worker is draining")
        try:
            num_blocks = check_start(start, self._spec.layout.block_size)
            check_sampling(
                start.sampling,
                vocab_size=self._spec.vocab_size,
                eos_token_ids=self._spec.eos_token_ids,
            )
        except ProtocolViolation as violation:
            return Failed(reason=Reason.INTERNAL, message=violation.message)
        except BadRequest as error:
            return Failed.of(error)
        if not math.isfinite(start.deadline_s):
            return Failed(reason=Reason.INVALID_FIELD, message="a deadline that is no number")
        if len(start.prompt_token_ids) > self._spec.max_context_tokens:
            return Failed(
                reason=Reason.CONTEXT_TOO_LONG,
                message=f"a prompt may have {self._spec.max_context_tokens} tokens; "
                f"got {len(start.prompt_token_ids)}",
            )
        if num_blocks > self._num_blocks:
            return Failed(
                reason=Reason.CONTEXT_TOO_LONG,
                message=f"the prompt needs {num_blocks} KV blocks; "
                f"the prefill worker has {self._num_blocks}",
            )
        return None

    def _read_prompt(self, start: StartHandoff) -> tuple[bytes, ...]:
        """Names of the prompt's full blocks; raises `BadRequest`."""
        if not are_below(start.prompt_token_ids, self._spec.vocab_size):
            raise BadRequest("a token id beyond the vocabulary")
        return self._spec.block_names(start.prompt_token_ids)
