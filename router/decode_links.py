"""The long-lived stream to each decode worker, and the inbox of each request on it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random

import structlog

from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault, Reason, WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, AttemptId
from pdserve.domain.messages import (
    Cancel,
    DecodeToRouter,
    PeerHello,
    RequestOutput,
    StepOutputs,
    Submit,
)
from pdserve.rpc.streams import DecodeLink as DecodeStream
from pdserve.rpc.streams import send_or_abort
from router.cluster_view import Life

log = structlog.get_logger(__name__)

FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 0.5

ConnectDecode = Callable[[str, Timers], Awaitable[DecodeStream]]


class Inbox:
    """Outputs of one attempt that its client has not taken yet: in order, without gaps, bounded.

    `watch` sees every output as it arrives, whatever the client does. `on_overflow` is called
    once, when more than `max_num_tokens` are waiting; nothing is taken in after that.
    """

    def __init__(
        self,
        *,
        max_answer_tokens: int,
        max_num_tokens: int,
        watch: Callable[[RequestOutput], None] = lambda output: None,
        on_overflow: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_answer_tokens = max_answer_tokens
        self._max_num_tokens = max_num_tokens
        self._watch = watch
        self._on_overflow = on_overflow
        self._outputs: list[RequestOutput] = []
        self._next_index = 0
        self._num_waiting_tokens = 0
        self._fault: PeerFault | None = None
        self._is_closed = False
        self.has_end = False  # the worker has ended the attempt and holds nothing for it
        self._has_news = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Add what continues the answer; drop what repeats it.

        A gap, or more tokens than were asked for, is the worker's fault and ends the attempt.
        """
        if self._is_closed or output.first_index < self._next_index:
            return
        if output.first_index > self._next_index:
            self.fail(WorkerLost("a decode worker left out tokens"))
            return
        if self._next_index + len(output.tokens) > self._max_answer_tokens:
            self.fail(WorkerLost("a decode worker sent more tokens than asked for"))
            return
        self._watch(output)
        self._next_index += len(output.tokens)
        self._num_waiting_tokens += len(output.tokens)
        if self._outputs and self._num_waiting_tokens > self._max_num_tokens:
            self._is_closed = True
            self._on_overflow()
            return
        self.has_end = self._is_closed = output.end is not None
        self._outputs.append(output)
        self._has_news.set()

    def fail(self, fault: PeerFault) -> None:
        """End with `fault`, unless the whole answer is here. Outputs still waiting are dropped.

        So an attempt that fails before anything reached the client can be replaced by another.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._outputs.clear()
        self._fault = fault
        self._has_news.set()

    async def take(self) -> RequestOutput:
        """Wait for outputs and return all there are, as one; raises the fault."""
        await self._has_news.wait()
        if self._fault is not None:
            raise self._fault
        self._has_news.clear()
        outputs, self._outputs = self._outputs, []
        self._num_waiting_tokens = 0
        return _merged(outputs)


def _merged(outputs: list[RequestOutput]) -> RequestOutput:
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[0],
        tokens=tuple(token for output in outputs for token in output.tokens),
        text="".join(output.text for output in outputs),
        end=outputs[-1].end,
    )


class DecodeLink:
    """One life of one decode worker; carries all requests of this router on it.

    `run` keeps the stream up and reconnects; its task belongs to the worker's registration. When
    the stream is lost every request on it fails at once.
    """

    def __init__(
        self,
        life: Life,
        address: str,
        *,
        me: PeerHello,
        connect: ConnectDecode,
        timers: Timers,
        rng: Random,
        on_change: Callable[[bool], None],
    ) -> None:
        self.life = life
        self._address = address
        self._me = me
        self._connect = connect
        self._timers = timers
        self._rng = rng
        self._on_change = on_change
        self._stream: DecodeStream | None = None
        self._inboxes: dict[AttemptId, Inbox] = {}

    def submit(self, submit: Submit, inbox: Inbox) -> None:
        """Send a request; its outputs go to `inbox` until `leave`. Raises `WorkerLost`."""
        if self._stream is None or not self._stream.try_send(submit):
            raise WorkerLost("the decode worker cannot be reached")
        self._inboxes[AttemptId(submit.request_id, submit.attempt)] = inbox

    def leave(self, attempt: AttemptId) -> None:
        """Take no more outputs; cancel at the worker unless it has ended there. Idempotent."""
        if self._inboxes.pop(attempt, None) is None or self._stream is None:
            return
        cancel = Cancel(request_id=attempt.request_id, attempt=attempt.attempt)
        send_or_abort(self._stream, cancel)

    async def run(self) -> None:
        """Connect, serve, reconnect; until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                stream = await self._open()
                backoff_s = FIRST_BACKOFF_S
                await self._serve(stream)
            except PeerFault as fault:
                log.warning("link.lost", worker_id=self.life.worker_id, why=fault.message)
            await asyncio.sleep(self._rng.uniform(0, backoff_s))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _open(self) -> DecodeStream:
        """Connect and exchange hellos; the worker must be in the life that registered."""
        stream = None
        try:
            async with asyncio.timeout(self._timers.connect_s):
                stream = await self._connect(self._address, self._timers)
                await stream.send(self._me)
                self._check_hello(await stream.receive())
        except BaseException as error:
            if stream is not None:
                await stream.close()
            if isinstance(error, TimeoutError):
                raise WorkerLost("the decode worker does not answer") from None
            raise
        return stream

    def _check_hello(self, hello: DecodeToRouter) -> None:
        if not isinstance(hello, PeerHello) or hello.protocol_version != PROTOCOL_VERSION:
            raise PeerFault("no hello of our version", reason=Reason.INCOMPATIBLE_PEER)
        if (hello.peer_id, hello.epoch) != (self.life.worker_id, self.life.epoch):
            raise PeerFault("another process answers at this address", reason=Reason.FENCED)

    async def _serve(self, stream: DecodeStream) -> None:
        """Hand out outputs until the stream is lost; raises `PeerFault`."""
        self._stream = stream
        self._on_change(True)
        log.info("link.opened", worker_id=self.life.worker_id)
        try:
            await self._read(stream)
        finally:
            self._lose()
            await stream.close()

    async def _read(self, stream: DecodeStream) -> None:
        while True:
            message = await stream.receive()
            try:
                self._hand_out(message)
            except Exception:
                # One bad message never ends the link, nor the process.
                log.exception("link.message_failed", worker_id=self.life.worker_id)
            # Requests take their turn between messages: a backlog is no fault of their clients.
            await asyncio.sleep(0)

    def _hand_out(self, message: DecodeToRouter) -> None:
        if not isinstance(message, StepOutputs):
            return
        for output in message.outputs:
            attempt = AttemptId(output.request_id, output.attempt)
            inbox = self._inboxes.get(attempt)
            if inbox is None:
                continue
            inbox.put(output)
            if inbox.has_end:
                del self._inboxes[attempt]

    def _lose(self) -> None:
        """Synchronous: no request is left on a link that is down."""
        self._stream = None
        self._on_change(False)
        inboxes, self._inboxes = self._inboxes, {}
        for inbox in inboxes.values():
            inbox.fail(WorkerLost("the decode worker was lost"))
