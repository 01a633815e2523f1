"""Serving a region through groups of two, to readers none of which is trusted to behave."""

import asyncio
import secrets
from collections.abc import Sequence

import structlog

from kvtransfer.transports.base import End, MayRead, OnRead, ReadEvent
from kvtransfer.transports.collective_control import Control
from kvtransfer.transports.collective_frames import (
    Ending,
    Kind,
    decode_hello,
    encode_end,
    encode_piece,
)
from kvtransfer.transports.collective_groups import NUM_SLOTS
from kvtransfer.transports.collective_lane import Lane, LaneLimits, MakeGroup
from kvtransfer.transports.requests import TOKEN_BYTES, BadFrame, decode_block_ids
from kvtransfer.transports.tcp_server import KEEP_ALIVE_S
from pdserve.config.binding import explain_listening, listen
from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import KvStore, block_runs

log = structlog.get_logger(__name__)


class CollectiveRegionServer:
    """Has a group with each reader and answers its reads of blocks that are on offer, until closed.

    A connection is *new* until it has said the token. When there are too many, the oldest new one
    makes room. Any fault of a peer costs it the connection and the group, and nothing else.
    """

    sees_reads = True

    def __init__(
        self,
        memory: KvStore,
        may_read: MayRead,
        on_read: OnRead,
        *,
        makers: dict[str, MakeGroup],
        limits: LaneLimits,
    ) -> None:
        self.num_dropped_connections = 0
        self.num_refused_reads = 0
        self._memory = memory
        self._may_read = may_read
        self._on_read = on_read
        self._makers = makers
        self._limits = limits
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._is_closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._new: dict[asyncio.Task[None], None] = {}

    async def open(self, host: str) -> None:
        """Listen at a free port of `host`."""
        try:
            listener = listen(host, 0)
        except OSError as error:
            raise LocalFault(
                f"cannot serve KV on {explain_listening(host, 0, error)}; choose another host"
            ) from None
        port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Control(self._admit), sock=listener)
        self.region = RemoteRegion(
            transport="collective",
            address={
                "host": host,
                "port": str(port),
                "token": self._token.hex(),
                "backends": ",".join(self._makers),
            },
            num_blocks=self._memory.num_blocks,
            block_bytes=self._memory.layout.block_bytes,
        )

    async def close(self) -> None:
        """Stop listening and end every group; harmless when called again."""
        self._is_closed = True
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _admit(self, control: Control) -> None:
        if self._is_closed:
            control.abort()
            return
        if len(self._tasks) >= self._limits.max_num_served_lanes:
            self.num_dropped_connections += 1
            oldest = next(iter(self._new), None)
            if oldest is None:
                control.abort()
                return
            del self._new[oldest]
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(
            self._converse(control), name="kv-collective-connection"
        )
        self._tasks.add(task)
        self._new[task] = None
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._new.pop(task, None)

    async def _converse(self, control: Control) -> None:
        """Serve one connection; only cancellation leaves this function."""
        try:
            await self._serve(control)
        except (BadFrame, OSError) as error:
            self.num_dropped_connections += 1
            log.debug("kv_server.connection_dropped", error=type(error).__name__)
        except Exception:  # the edge: one bad peer never ends the service of the others
            self.num_dropped_connections += 1
            log.exception("kv_server.connection_broken")
        finally:
            await control.close()

    async def _serve(self, control: Control) -> None:
        """Until the reader hangs up between two reads, or asks for nothing for long."""
        hello = await control.frame(self._limits.idle_timeout_s)
        if hello.kind is not Kind.HELLO:
            raise BadFrame(f"{hello.kind.name} as the first frame")
        reader, backend = decode_hello(hello.body, self._token)
        if (make := self._makers.get(backend)) is None:
            raise BadFrame("a backend that was not offered")
        if (task := asyncio.current_task()) is not None:
            self._new.pop(task, None)
        block_bytes = self._memory.layout.block_bytes
        lane = Lane(control, block_bytes=block_bytes, limits=self._limits)
        try:
            await lane.meet(make, rank=0)
            while await self._answer(lane, reader):
                pass
        finally:
            await lane.close()

    async def _answer(self, lane: Lane, reader: End) -> bool:
        """One frame; False if the reader is gone."""
        try:
            frame = await lane.control.frame(KEEP_ALIVE_S)
        except (ConnectionResetError, TimeoutError):
            return False
        if frame.kind is Kind.READ:
            ending = await self._reply(lane, reader, decode_block_ids(frame.body, self._num_blocks))
            lane.control.send(encode_end(ending))
        elif frame.kind is not Kind.STOP:  # which may come when all was sent
            raise BadFrame(f"{frame.kind.name} between reads")
        return True

    @property
    def _num_blocks(self) -> int:
        return self._memory.num_blocks

    async def _reply(self, lane: Lane, reader: End, block_ids: Sequence[BlockId]) -> Ending:
        if not await self._may_read(block_ids):
            self.num_refused_reads += 1
            return Ending.NOT_ON_OFFER
        self._on_read(ReadEvent(reader, tuple(block_ids), is_over=False))
        try:
            async with asyncio.timeout(self._limits.total_timeout_s):
                return await self._send_blocks(lane, block_ids)
        finally:  # what is still under way lies in slots, apart from the blocks
            self._on_read(ReadEvent(reader, tuple(block_ids), is_over=True))

    async def _send_blocks(self, lane: Lane, block_ids: Sequence[BlockId]) -> Ending:
        """Each piece is gathered while the one before it travels."""
        count = lane.blocks_per_piece
        for number, first in enumerate(range(0, len(block_ids), count)):
            piece, slot = block_ids[first : first + count], number % NUM_SLOTS
            if first and not await self._may_read(piece):
                await lane.settle()
                return Ending.NOT_ON_OFFER
            await lane.gather(slot, self._memory, list(block_runs(range(len(piece)), piece)))
            await lane.settle()
            if lane.control.poll(Kind.STOP):
                return Ending.STOPPED
            lane.control.send(encode_piece(len(piece)))
            lane.start_send(slot, len(piece))
        await lane.settle()
        return Ending.ALL_SENT
