"""Streams to prefill workers: opened when first needed, shared by all handoffs, kept alive."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

import structlog

from kvtransfer.transports import choose
from kvtransfer.transports.base import Transport
from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault, Reason, Refused, TransferFailed, WorkerLost
from pdserve.domain.ids import HandoffId, WorkerId
from pdserve.domain.messages import (
    BlocksOffered,
    HandoffFailed,
    HandoffHello,
    HandoffRefused,
    PrefillDone,
    PrefillTarget,
    PrefillToDecode,
    RemoteRegion,
    RenewLeases,
)
from pdserve.domain.tokens import Failed
from pdserve.rpc.links import PrefillLink
from pdserve.rpc.streams import Mailbox, iterate, receive_hello

log = structlog.get_logger(__name__)

Connect = Callable[[str], Awaitable[PrefillLink]]


class HandoffInbox:
    """What one prefill worker says about one handoff, until `failure` is set."""

    def __init__(self) -> None:
        self.offers: Mailbox[BlocksOffered] = Mailbox()
        self.done: asyncio.Future[PrefillDone] = asyncio.get_running_loop().create_future()
        self.failure: PeerFault | Refused | None = None

    def take(self, message: PrefillToDecode) -> None:
        match message:
            case BlocksOffered():
                if not self.offers.try_put(message):
                    self.fail(TransferFailed("more offers than a prompt has blocks"))
            case PrefillDone():
                if not self.done.done():
                    self.done.set_result(message)
            case HandoffRefused():
                self.fail(_refusal(message.failure))
            case HandoffFailed():
                self.fail(PeerFault(message.failure.message, reason=message.failure.reason))
            case HandoffHello():
                pass

    def fail(self, error: PeerFault | Refused) -> None:
        """End the handoff for whoever waits for its offers or its first token."""
        if self.failure is None:
            self.failure = error
        self.offers.end()
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # read here: nobody may be waiting for it

    async def next_offer(self) -> BlocksOffered:
        """The next offer; raises how the handoff failed."""
        offer = await self.offers.take()
        if self.failure is not None:  # also for offers that came before: their blocks may be gone
            raise self.failure
        assert offer is not None, "only a failure ends the offers"
        return offer


def _refusal(failure: Failed) -> PeerFault | Refused:
    if failure.reason is Reason.INTERNAL:
        return PeerFault(failure.message, reason=failure.reason)
    return Refused(failure.message, reason=failure.reason, retry_after_s=failure.retry_after_s)


class PeerLink:
    """One open stream to one life of one prefill worker."""

    def __init__(
        self,
        stream: PrefillLink,
        worker_id: WorkerId,
        transport: Transport,
        region: RemoteRegion,
    ) -> None:
        self.stream = stream
        self.worker_id = worker_id
        self.transport = transport
        self.region = region
        self.is_lost = False
        self._inboxes: dict[HandoffId, HandoffInbox] = {}

    def open(self, handoff: HandoffId) -> HandoffInbox:
        """Start to collect what comes for `handoff`; raises `WorkerLost` if the stream is over."""
        if self.is_lost:
            raise WorkerLost(f"prefill worker {self.worker_id} is lost")
        self._inboxes[handoff] = HandoffInbox()
        return self._inboxes[handoff]

    def close(self, handoff: HandoffId) -> None:
        """Drop whatever still comes for `handoff`."""
        self._inboxes.pop(handoff, None)

    async def run(self, renew_s: float) -> None:
        """Give each message to its handoff, until the stream is over; then fail what is open."""
        try:
            async with asyncio.TaskGroup() as tasks:
                renewing = tasks.create_task(self._renew_leases(renew_s))
                async for message in iterate(self.stream):
                    self._take(message)
                renewing.cancel()
        finally:
            self.is_lost = True
            error = WorkerLost(f"prefill worker {self.worker_id} is lost")
            for inbox in self._inboxes.values():
                inbox.fail(error)
            await self.transport.close_peer(self.region)
            await self.stream.close()

    def _take(self, message: PrefillToDecode) -> None:
        if isinstance(message, HandoffHello):
            return
        inbox = self._inboxes.get(message.handoff)
        if inbox is not None:
            inbox.take(message)

    async def _renew_leases(self, renew_s: float) -> None:
        """Keep the blocks of open handoffs pinned."""
        while True:
            await asyncio.sleep(renew_s)
            if self._inboxes:
                self.stream.try_send(RenewLeases(tuple(self._inboxes)))


class PrefillLinks:
    """All links of one decode worker; an async context that owns their tasks."""

    def __init__(
        self,
        connect: Connect,
        hello: HandoffHello,
        transports: Sequence[Transport],
        timers: Timers,
    ) -> None:
        self._connect = connect
        self._hello = hello
        self._transports = transports
        self._timers = timers
        self._links: dict[PrefillTarget, PeerLink] = {}
        self._opening: dict[PrefillTarget, asyncio.Task[PeerLink | PeerFault]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> "PrefillLinks":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in (*self._opening.values(), *self._running):
            task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    async def get(self, target: PrefillTarget) -> PeerLink:
        """The open link to this life of the worker; raises `PeerFault` if there can be none."""
        link = self._links.get(target)
        if link is not None and not link.is_lost:
            return link
        opening = self._opening.get(target)
        if opening is None:
            opening = self._tasks.create_task(self._open_guarded(target))
            self._opening[target] = opening
            opening.add_done_callback(lambda _: self._opening.pop(target, None))
        result = await asyncio.shield(opening)
        if isinstance(result, PeerFault):
            raise result
        return result

    async def _open_guarded(self, target: PrefillTarget) -> PeerLink | PeerFault:
        """A fault is a value here, since an exception would end every other link's task."""
        try:
            return await self._open(target)
        except PeerFault as fault:
            return fault
        except Exception as error:
            log.error("prefill_worker.link_failed", worker_id=target.worker_id, exc_info=error)
            return WorkerLost(f"prefill worker {target.worker_id} cannot be linked")

    async def _open(self, target: PrefillTarget) -> PeerLink:
        stream = await self._connect(target.address)
        try:
            await stream.send(self._hello)
            theirs = await receive_hello(stream, self._timers.connect_s)
            link = self._accept(stream, target, theirs)
        except BaseException:
            await stream.close()
            raise
        self._forget_lost()
        self._links[target] = link
        running = self._tasks.create_task(self._run_guarded(link))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        log.info("prefill_worker.linked", worker_id=target.worker_id, transport=link.transport.name)
        return link

    async def _run_guarded(self, link: PeerLink) -> None:
        try:
            await link.run(self._timers.renew_s)
        except Exception as error:
            log.error("prefill_worker.link_crashed", worker_id=link.worker_id, exc_info=error)

    def _accept(
        self, stream: PrefillLink, target: PrefillTarget, theirs: PrefillToDecode
    ) -> PeerLink:
        if not isinstance(theirs, HandoffHello) or theirs.epoch != target.epoch:
            raise WorkerLost(f"prefill worker {target.worker_id} has restarted")
        mine = self._hello
        if (theirs.model_hash, theirs.layout_hash) != (mine.model_hash, mine.layout_hash):
            raise PeerFault(
                f"prefill worker {target.worker_id} serves another model or KV layout",
                reason=Reason.INCOMPATIBLE_PEER,
            )
        chosen = choose(self._transports, theirs.regions)
        if chosen is None:
            raise PeerFault(
                f"no transport reaches prefill worker {target.worker_id}",
                reason=Reason.INCOMPATIBLE_PEER,
            )
        return PeerLink(stream, target.worker_id, *chosen)

    def _forget_lost(self) -> None:
        self._links = {target: link for target, link in self._links.items() if not link.is_lost}
