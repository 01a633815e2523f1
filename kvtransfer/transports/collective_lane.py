"""One end of a pair: a control connection, a group of two, and the thread that waits for it.

    event loop                        guard thread
    Control: frames, the peer's end   PairGroup: make, send, receive, close: blocking, by deadlines
    gather, scatter      ◀── slots ──▶

The event loop learns of a peer's death from the connection, at once. The thread may go on waiting
for bytes that will not come, until the deadline of its operation; nobody waits for it but `close`.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from kvtransfer.transports.collective_control import MADE, Control
from kvtransfer.transports.collective_frames import (
    MAX_NUM_KEYS,
    Frame,
    Kind,
    decode_key,
    encode_key,
)
from kvtransfer.transports.collective_groups import ExchangeStore, PairGroup, PairTerms
from kvtransfer.transports.guard_thread import GuardThread
from kvtransfer.transports.requests import BadFrame
from pdserve.domain.invariants import check_invariant
from pdserve.engine.kv_store import BlockRun, KvStore

log = structlog.get_logger(__name__)

SLOT_BYTES = 4 << 20
_MARGIN_S = 1.0
"""On top of the deadline of an operation, until its thread is given up as wedged.

gloo's is for each of the steps of making a group: addresses, connections, a second try.
"""

MakeGroup = Callable[[ExchangeStore, PairTerms], PairGroup]
"""Blocks until the other end makes its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLimits:
    """Of making a group, of each operation or silence, of a whole read; and how many there are."""

    connect_timeout_s: float
    idle_timeout_s: float
    total_timeout_s: float
    max_num_lanes: int = 16  # of a reader, to all peers
    max_num_served_lanes: int = 128
    max_idle_s: float = 30.0  # of a lane, until its reader gives it up


def blocks_per_piece(block_bytes: int) -> int:
    """Both ends cut replies alike."""
    return max(1, SLOT_BYTES // block_bytes)


class Lane:
    """Whoever makes one closes it. Faults are `OSError`, which `TimeoutError` is, or `BadFrame`.

    After a fault it is of no more use, and closing it is all that can be done.
    """

    def __init__(self, control: Control, *, block_bytes: int, limits: LaneLimits) -> None:
        self.control = control
        self.block_bytes = block_bytes
        self.blocks_per_piece = blocks_per_piece(block_bytes)
        self.is_replying = False  # for whoever reads: an END is still to come
        self._limits = limits
        self._guard = GuardThread("kv-collective")
        self._group: PairGroup | None = None
        self._job: asyncio.Future[None] | None = None
        self._meeting: asyncio.Task[None] | None = None

    async def meet(self, make: MakeGroup, rank: int) -> None:
        """Make the group, together with the other end; if cancelled, that goes on until `close`.

        Both ends are quick then, while the thread of one that is left alone waits for its deadline.
        """
        self._meeting = asyncio.create_task(self._meet(make, rank), name="kv-collective-meeting")
        await asyncio.shield(self._meeting)

    async def _meet(self, make: MakeGroup, rank: int) -> None:
        loop, deadline_s = asyncio.get_running_loop(), self._limits.connect_timeout_s

        def tell(key: str, value: bytes) -> None:
            loop.call_soon_threadsafe(self.control.send, encode_key(key, value))

        store = ExchangeStore(tell, deadline_s)
        terms = PairTerms(
            rank=rank,
            host=self.control.host,
            slot_bytes=self.blocks_per_piece * self.block_bytes,
            make_s=deadline_s,
            move_s=self._limits.idle_timeout_s,
        )
        making = self._guard.submit(lambda: self._keep(make(store, terms)))
        making.add_done_callback(self._tell_made)
        try:
            async with asyncio.timeout(deadline_s):
                await self._hear_keys(store)
                await self._over(making)
        finally:
            store.lose()  # ends the wait in `make`, if it still waits

    async def _hear_keys(self, store: ExchangeStore) -> None:
        """Pass on what the other end sets, until it has made its group."""
        while (frame := await self.control.frame(self._limits.connect_timeout_s)).kind is Kind.KEY:
            if store.num_keys >= MAX_NUM_KEYS:
                raise BadFrame("more keys than a group needs")
            store.hear(*decode_key(frame.body))
        if frame.kind is not Kind.MADE:
            raise BadFrame(f"{frame.kind.name} before the group was made")

    def _tell_made(self, making: asyncio.Future[None]) -> None:
        if not making.cancelled() and making.exception() is None:
            self.control.send(MADE)

    def _keep(self, group: PairGroup) -> None:
        self._group = group

    async def frame(self) -> Frame:
        """What the other end says next, which may not be silent for long."""
        return await self.control.frame(self._limits.idle_timeout_s)

    def start_send(self, slot: int, num_blocks: int) -> None:
        """One operation at a time: `settle` before the next one."""
        group, num_bytes = self._made(), num_blocks * self.block_bytes
        self._start(lambda: group.send(slot, num_bytes))

    def start_receive(self, slot: int, num_blocks: int) -> None:
        """As `start_send`."""
        group, num_bytes = self._made(), num_blocks * self.block_bytes
        self._start(lambda: group.receive(slot, num_bytes))

    async def settle(self) -> None:
        """Wait until the operation is over; if cancelled, or the peer is lost, it goes on."""
        if (job := self._job) is None:
            return
        await self._over(job)
        self._job = None

    async def _over(self, job: asyncio.Future[None]) -> None:
        await asyncio.wait([job, self.control.lost], return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ConnectionResetError("closed by the peer")
        job.result()

    async def gather(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        await self._made().gather(slot, memory, runs)

    async def scatter(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        await self._made().scatter(slot, memory, runs)

    def _made(self) -> PairGroup:
        if self._group is None:
            raise ConnectionAbortedError("no group was made")
        return self._group

    def _start(self, work: Callable[[], None]) -> None:
        check_invariant(self._job is None, "one operation is under way in a group")
        self._job = self._guard.submit(work)

    async def close(self) -> None:
        """Hang up, and wait for the thread: for one deadline at most, if it waits for bytes."""
        limits = self._limits
        try:
            if self._meeting is not None:
                await asyncio.wait([self._meeting])
                self._meeting.exception()
            await self.control.close()
        finally:
            patience_s = _MARGIN_S + max(3 * limits.connect_timeout_s, limits.idle_timeout_s)
            if not await self._guard.end(self._drop_group, patience_s):
                log.error("kv_collective.thread_wedged", waited_s=patience_s)

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()
