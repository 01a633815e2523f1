"""Streams to prefill workers: opened when first needed, shared by all handoffs, kept alive."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from kvtransfer.leading import OpenReader
from kvtransfer.reading import BlockReader
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.session import ProtocolViolation
from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault, PeerFault, Reason, WorkerLost
from pdserve.domain.ids import HandoffId, WorkerId
from pdserve.domain.kv_exchange import exchange_obstacle
from pdserve.domain.messages import (
    DecodeToPrefill,
    HandoffHello,
    KvMoved,
    KvPath,
    PrefillTarget,
    PrefillToDecode,
    RenewLeases,
    Role,
)
from pdserve.observe.watch import NO_DECODE_WATCH, DecodeWatch
from pdserve.rpc.streams import PrefillLink, iterate, receive_hello, send_or_abort

log = structlog.get_logger(__name__)

Connect = Callable[[str, Timers], Awaitable[PrefillLink]]


class PeerLink:
    """One open stream to one life of one prefill worker."""

    def __init__(
        self,
        stream: PrefillLink,
        worker_id: WorkerId,
        reader: BlockReader,
        watch: DecodeWatch,
    ) -> None:
        self.stream = stream
        self.worker_id = worker_id
        self.reader = reader
        self.is_lost = False
        self.moved = KvMoved()  # of handoffs that are over
        self._watch = watch
        self._receivers: dict[HandoffId, HandoffReceiver] = {}

    def open(self, receiver: HandoffReceiver) -> None:
        """Let it hear what comes for its handoff; raises `WorkerLost` if the stream is over."""
        if self.is_lost:
            raise WorkerLost(f"prefill worker {self.worker_id} is lost")
        self._receivers[receiver.handoff] = receiver

    def close(self, receiver: HandoffReceiver) -> None:
        """Drop whatever still comes for its handoff, and end it at the peer if it is open there."""
        self._receivers.pop(receiver.handoff, None)
        self.moved = self.moved.plus(receiver.moved)
        self._watch.kv_moved(self.worker_id, self.reader.path.transport_name, receiver.moved)
        if (end := receiver.end()) is not None:
            self.send(end)
        fields = dataclasses.asdict(receiver.handoff)
        log.debug("handoff.ended", role=Role.DECODE, phase=receiver.phase.name, **fields)

    def send(self, message: DecodeToPrefill) -> None:
        """Send a message; where it cannot be sent, the stream ends, and every handoff on it."""
        send_or_abort(self.stream, message)

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
            for receiver in self._receivers.values():
                receiver.lose(error)
            try:
                await self.reader.close()
            finally:
                await self.stream.close()

    def _take(self, message: PrefillToDecode) -> None:
        """Whatever a message says or does, only its own handoff ends."""
        if isinstance(message, HandoffHello) or message.handoff not in self._receivers:
            self._watch.message_dropped("late")
            return
        receiver = self._receivers[message.handoff]
        try:
            if not receiver.hear(message):
                self._watch.message_dropped("late")
        except ProtocolViolation as violation:
            log.warning("peer.violated", peer=self.stream.peer, why=violation.message)
            self._watch.message_dropped("violation")
            receiver.fail(violation)
        except Exception as error:
            log.error("handoff.crashed", worker_id=self.worker_id, exc_info=error)
            receiver.fail(LocalFault("internal error at the decode worker"))

    async def _renew_leases(self, renew_s: float) -> None:
        """Keep the blocks of open handoffs pinned."""
        while True:
            await asyncio.sleep(renew_s)
            if self._receivers:
                self.send(RenewLeases(tuple(self._receivers)))


class PrefillLinks:
    """All links of one decode worker; an async context that owns their tasks."""

    def __init__(
        self,
        connect: Connect,
        hello: HandoffHello,
        open_reader: OpenReader,
        timers: Timers,
        watch: DecodeWatch = NO_DECODE_WATCH,
    ) -> None:
        self._connect = connect
        self._hello = hello
        self._open_reader = open_reader
        self._timers = timers
        self._watch = watch
        self._links: dict[PrefillTarget, PeerLink] = {}
        self._opening: dict[PrefillTarget, asyncio.Task[PeerLink | PeerFault]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> "PrefillLinks":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        for task in (*self._opening.values(), *self._running):
            task.cancel()
        await self._tasks.__aexit__(*error)

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
        stream = await self._connect(target.address, self._timers)
        try:
            await stream.send(self._hello)
            theirs = await receive_hello(stream, self._timers.connect_s)
            link = await self._accept(stream, target, theirs)
        except BaseException:
            await stream.close()
            raise
        self._forget_lost()
        self._links[target] = link
        running = self._tasks.create_task(self._run_guarded(link))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        log.info(
            "prefill_worker.linked",
            worker_id=target.worker_id,
            transport=link.reader.path.transport_name,
            why=link.reader.path.why,
        )
        return link

    async def _run_guarded(self, link: PeerLink) -> None:
        try:
            await link.run(self._timers.renew_s)
        except Exception as error:
            log.error("prefill_worker.link_crashed", worker_id=link.worker_id, exc_info=error)

    async def _accept(
        self, stream: PrefillLink, target: PrefillTarget, theirs: PrefillToDecode
    ) -> PeerLink:
        if not isinstance(theirs, HandoffHello) or theirs.epoch != target.epoch:
            raise WorkerLost(f"prefill worker {target.worker_id} has restarted")
        obstacle = exchange_obstacle(self._hello, theirs)
        reader = None if obstacle else await self._open_reader(theirs)
        if reader is None:
            raise PeerFault(
                f"prefill worker {target.worker_id}: {obstacle or 'no transport reaches it'}",
                reason=Reason.INCOMPATIBLE_PEER,
            )
        return PeerLink(stream, target.worker_id, reader, self._watch)

    def kv_paths(self) -> tuple[KvPath, ...]:
        """Of the links that are open."""
        return tuple(
            KvPath(
                worker_id=link.worker_id,
                transport=link.reader.path.transport_name,
                why=link.reader.path.why,
                num_fallbacks=link.reader.path.num_fallbacks,
                moved=link.moved,
            )
            for link in self._links.values()
            if not link.is_lost
        )

    def _forget_lost(self) -> None:
        self._links = {target: link for target, link in self._links.items() if not link.is_lost}
