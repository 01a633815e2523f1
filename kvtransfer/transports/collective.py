"""Reading a peer's memory through torch.distributed: gloo between hosts, NCCL between GPUs.

    reader: Lane ── control connection: who, which blocks, how many come ── Lane :owner
            slots ◀───────────── group of two: the bytes ───────────────── slots
              └──▶ blocks of `memory`, unless the read was cancelled meanwhile

A pair of processes has one lane for each region and backend, made when first needed and dropped
when idle. Reads of a pair take turns. Whatever still arrives for a read that was given up ends in
a slot.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from kvtransfer.transports.base import NOBODY, End, MayRead, OnRead, check_read, ignore
from kvtransfer.transports.collective_control import STOP, Control
from kvtransfer.transports.collective_frames import (
    Ending,
    Frame,
    Kind,
    decode_end,
    decode_piece,
    encode_hello,
    encode_read,
)
from kvtransfer.transports.collective_groups import NUM_SLOTS, GlooPair
from kvtransfer.transports.collective_lane import Lane, LaneLimits, MakeGroup
from kvtransfer.transports.collective_server import CollectiveRegionServer
from kvtransfer.transports.requests import (
    MAX_BLOCKS_PER_REQUEST,
    BadFrame,
    TokenAddress,
    read_within,
)
from pdserve.domain.errors import ReadRefused, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import KvStore, block_runs

log = structlog.get_logger(__name__)

GLOO, NCCL = "gloo", "nccl"


def _backends_of(region: RemoteRegion) -> list[str]:
    return region.address.get("backends", "").split(",")


class _Pair:
    """This process and one region, through one backend. Whoever has the turn uses the lane."""

    def __init__(self, address: TokenAddress, backend: str, make: MakeGroup) -> None:
        self.address = address
        self.backend = backend
        self.make = make
        self.turn = asyncio.Lock()
        self.lane: Lane | None = None
        self.used_s = 0.0
        self.is_closed = False


class CollectiveTransport:
    """Owns its lanes, and a task for each that is being closed or emptied."""

    name = "collective"

    def __init__(self, host: str, *, limits: LaneLimits, end: End = NOBODY) -> None:
        """`host` is where the regions served from here are reached."""
        self._host = host
        self._limits = limits
        self._end = end
        self._pairs: dict[tuple[TokenAddress, str], _Pair] = {}
        self._permits = asyncio.Semaphore(limits.max_num_lanes)
        self._num_waiting = 0  # for a permit
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_timer: asyncio.TimerHandle | None = None

    async def register(self, memory: KvStore) -> None:
        """Every store can be copied into as it is."""

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> CollectiveRegionServer:
        server = CollectiveRegionServer(
            memory, may_read, on_read, makers=_makers_for(memory), limits=self._limits
        )
        await server.open(self._host)
        return server

    def can_reach(self, region: RemoteRegion) -> bool:
        if region.transport != self.name:
            return False
        try:
            return bool(TokenAddress.of(region)) and GLOO in _backends_of(region)
        except TransferFailed:
            return False

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        check_read(region, remote_blocks, memory, local_blocks)
        pair = self._pair(region, memory)
        if not remote_blocks:
            return
        await pair.turn.acquire()
        try:
            limits = self._limits
            async with read_within(
                limits.total_timeout_s, limits.idle_timeout_s, lambda: self._drop(pair)
            ):
                lane = await self._lane(pair, region.block_bytes)
                for first in range(0, len(remote_blocks), MAX_BLOCKS_PER_REQUEST):
                    part = slice(first, first + MAX_BLOCKS_PER_REQUEST)
                    await _read_part(lane, remote_blocks[part], memory, local_blocks[part])
        finally:
            self._leave(pair)

    def _pair(self, region: RemoteRegion, memory: KvStore) -> _Pair:
        """That of the region and `memory`, by the fastest backend that moves between the two."""
        address, makers = TokenAddress.of(region), _makers_for(memory)
        backend = NCCL if NCCL in _backends_of(region) and NCCL in makers else GLOO
        new = _Pair(address, backend, makers[backend])
        return self._pairs.setdefault((address, backend), new)

    async def _lane(self, pair: _Pair, block_bytes: int) -> Lane:
        """That of the pair, for whoever has its turn."""
        if pair.lane is not None and pair.lane.control.lost.done():
            self._drop(pair)
        if pair.lane is None:
            await self._take_permit()
            try:
                control = await self._connect(pair)
            except BaseException:
                self._permits.release()
                raise
            pair.lane = lane = Lane(control, block_bytes=block_bytes, limits=self._limits)
            control.lost.add_done_callback(lambda _: self._forget(pair, lane))
            if pair.is_closed:
                raise ConnectionAbortedError("closed by this side")
            try:
                control.send(encode_hello(pair.address.token, self._end, pair.backend))
                await lane.meet(pair.make, rank=1)
            except TimeoutError:
                self._drop(pair)
                limit_s = self._limits.connect_timeout_s
                raise TransferFailed(f"the peer made no group within {limit_s:g} s") from None
            except BaseException:
                self._drop(pair)
                raise
        if pair.lane is None:
            raise ConnectionAbortedError("closed by this side while the group was made")
        return pair.lane

    async def _connect(self, pair: _Pair) -> Control:
        if pair.is_closed:
            raise ConnectionAbortedError("closed by this side")
        address, limit_s = pair.address, self._limits.connect_timeout_s
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                _, control = await loop.create_connection(Control, address.host, address.port)
        except TimeoutError:
            raise TransferFailed(f"the peer took no connection within {limit_s:g} s") from None
        return control

    async def _take_permit(self) -> None:
        """For one more lane; idle ones make room, the one that was used least recently first."""
        if self._permits.locked():
            idle = [each for each in self._pairs.values() if each.lane and not each.turn.locked()]
            if idle:
                self._drop(min(idle, key=lambda each: each.used_s))
        self._num_waiting += 1
        try:
            await self._permits.acquire()
        finally:
            self._num_waiting -= 1

    def _leave(self, pair: _Pair) -> None:
        """Give up the turn; a reply that is still under way is received to its end before."""
        pair.used_s = asyncio.get_running_loop().time()
        if pair.lane is not None and pair.lane.is_replying:
            self._spawn(self._empty(pair, pair.lane))
            return
        if self._num_waiting or pair.is_closed:
            self._drop(pair)
        pair.turn.release()
        self._watch_idle()

    async def _empty(self, pair: _Pair, lane: Lane) -> None:
        try:
            async with asyncio.timeout(self._limits.idle_timeout_s):
                lane.control.send(STOP)
                await _receive_rest(lane)
        except (OSError, BadFrame):
            if pair.lane is lane:
                self._drop(pair)
        finally:
            self._leave(pair)

    def _forget(self, pair: _Pair, lane: Lane) -> None:
        """Its peer is gone: unless somebody uses it, who will see that."""
        if pair.lane is lane and not pair.turn.locked():
            self._drop(pair)

    def _drop(self, pair: _Pair) -> None:
        lane, pair.lane = pair.lane, None
        if lane is not None:
            self._spawn(self._close_lane(lane))

    async def _close_lane(self, lane: Lane) -> None:
        try:
            await lane.close()
        finally:
            self._permits.release()

    def _watch_idle(self) -> None:
        """Drop lanes that nobody has used for long; look again when the next one may be due."""
        if self._idle_timer is not None:
            return
        loop = asyncio.get_running_loop()

        def look() -> None:
            self._idle_timer = None
            due_s = loop.time() - self._limits.max_idle_s
            for pair in self._pairs.values():
                if pair.lane is not None and not pair.turn.locked() and pair.used_s <= due_s:
                    self._drop(pair)
            self._watch_idle()

        used = [pair.used_s for pair in self._pairs.values() if pair.lane is not None]
        if used:
            self._idle_timer = loop.call_at(min(used) + self._limits.max_idle_s, look)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="kv-collective-lane")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close_peer(self, region: RemoteRegion) -> None:
        try:
            address = TokenAddress.of(region)
        except TransferFailed:
            return
        await self._close_pairs([key for key in self._pairs if key[0] == address])

    async def close(self) -> None:
        """Also ends the reads that run; servers are closed by whoever asked for them."""
        await self._close_pairs(list(self._pairs))
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    async def _close_pairs(self, keys: Sequence[tuple[TokenAddress, str]]) -> None:
        pairs = [self._pairs.pop(key) for key in keys]
        for pair in pairs:
            pair.is_closed = True
            self._drop(pair)
        for pair in pairs:
            async with pair.turn:  # whoever has it, or waits for it, fails
                pass
        while self._tasks:
            await asyncio.wait(self._tasks)


async def _read_part(
    lane: Lane,
    remote_blocks: Sequence[BlockId],
    memory: KvStore,
    local_blocks: Sequence[BlockId],
) -> None:
    """One request; each piece is written to its blocks while the next one travels."""
    lane.is_replying = True
    lane.control.send(encode_read(remote_blocks))
    num_received = num_landed = number = 0

    async def land() -> None:
        nonlocal num_landed
        piece = local_blocks[num_landed:num_received]
        if piece:
            runs = list(block_runs(range(len(piece)), piece))
            await lane.scatter((number - 1) % NUM_SLOTS, memory, runs)
            num_landed += len(piece)

    while (frame := await lane.frame()).kind is Kind.PIECE:
        num_left = len(remote_blocks) - num_received
        num_blocks = decode_piece(frame.body, min(lane.blocks_per_piece, num_left))
        lane.start_receive(number % NUM_SLOTS, num_blocks)
        await land()
        await lane.settle()
        num_received += num_blocks
        number += 1
    ending = _ending(lane, frame)
    if ending is Ending.NOT_ON_OFFER:
        raise ReadRefused("the peer refuses: the blocks are not on offer")
    if ending is not Ending.ALL_SENT or num_received != len(remote_blocks):
        raise BadFrame("a reply that ends before all was sent")
    await land()


async def _receive_rest(lane: Lane) -> None:
    """What is still under way for a read that was given up: it stays in a slot."""
    await lane.settle()
    while (frame := await lane.frame()).kind is Kind.PIECE:
        lane.start_receive(0, decode_piece(frame.body, lane.blocks_per_piece))
        await lane.settle()
    _ending(lane, frame)


def _ending(lane: Lane, frame: Frame) -> Ending:
    if frame.kind is not Kind.END:
        raise BadFrame(f"{frame.kind.name} in a reply")
    lane.is_replying = False
    return decode_end(frame.body)


def _makers_for(memory: KvStore) -> dict[str, MakeGroup]:
    """By backend, the groups that can move blocks of `memory`."""
    makers: dict[str, MakeGroup] = {GLOO: GlooPair}
    if memory.host_blocks(()) is None and (device := memory.tensor().device).type == "cuda":
        from kvtransfer.transports.collective_nccl import NcclPair, is_nccl_there  # few need it

        if is_nccl_there():
            makers[NCCL] = lambda store, terms: NcclPair(store, terms, device)
    return makers
