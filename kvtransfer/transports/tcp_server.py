"""Serving a region to readers on other hosts, none of which is trusted to behave."""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from kvtransfer.transports.base import End, MayRead, OnRead, ReadEvent
from kvtransfer.transports.requests import TOKEN_BYTES, BadFrame, decode_block_ids
from kvtransfer.transports.sockets import BYTES_PER_TURN, recv_all, send_all
from kvtransfer.transports.tcp_frames import (
    REQUEST_HEADER_BYTES,
    Status,
    decode_request_header,
    encode_reply,
)
from pdserve.config.binding import explain_listening, listen
from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore, bytes_of

log = structlog.get_logger()

_ACCEPT_PAUSE_S = 0.1
_FIRST_RECV_BYTES = 4096  # most requests come whole in one call
KEEP_ALIVE_S = 60.0
"""Between the requests of one connection; readers take another one well before."""


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise LocalFault(
            f"cannot serve KV on {explain_listening(host, port, error)}; choose another kv_port"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpLimits:
    """Of one side's silence, of a whole read or reply, and of how much happens at a time."""

    connect_timeout_s: float
    idle_timeout_s: float
    total_timeout_s: float
    max_num_connections_per_peer: int = 8
    max_num_served_connections: int = 256


class TcpRegionServer:
    """Answers reads of blocks that are on offer, until closed.

    A connection is *new* until its first request was one of ours. When there are too many, the
    oldest new one makes room, so that strangers cannot keep readers out. Any fault of a peer costs
    it the connection, and nothing else.
    """

    sees_reads = True

    def __init__(
        self,
        memory: KvStore,
        may_read: MayRead,
        on_read: OnRead,
        *,
        host: str,
        port: int,
        limits: TcpLimits,
    ) -> None:
        self.num_dropped_connections = 0
        self.num_refused_reads = 0
        self._memory = memory
        self._may_read = may_read
        self._on_read = on_read
        self._limits = limits
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._num_connections = 0
        self._new: dict[asyncio.Task[None], None] = {}
        self._listener = _listen(host, port)
        self._listener.setblocking(False)
        self.region = RemoteRegion(
            transport="tcp",
            address={
                "host": host,
                "port": str(self._listener.getsockname()[1]),
                "token": self._token.hex(),
            },
            num_blocks=memory.num_blocks,
            block_bytes=memory.layout.block_bytes,
        )
        self._task = asyncio.create_task(self._accept_all(), name="kv-tcp-server")

    async def close(self) -> None:
        """Stop listening and drop every connection; harmless when called again."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._listener.close()

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as connections:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # out of descriptors, or the peer is gone already
                    log.warning("kv_server.accept_failed", error=type(error).__name__)
                    await asyncio.sleep(_ACCEPT_PAUSE_S)
                    continue
                self._admit(sock, connections)

    def _admit(self, sock: socket.socket, connections: asyncio.TaskGroup) -> None:
        if self._num_connections >= self._limits.max_num_served_connections:
            self.num_dropped_connections += 1
            oldest = next(iter(self._new), None)
            if oldest is None:
                sock.close()
                return
            del self._new[oldest]
            oldest.cancel()
        self._num_connections += 1
        task = connections.create_task(self._converse(sock), name="kv-tcp-connection")
        self._new[task] = None
        task.add_done_callback(lambda task: self._forget(task, sock))

    def _forget(self, task: asyncio.Task[None], sock: socket.socket) -> None:
        sock.close()
        self._num_connections -= 1
        self._new.pop(task, None)

    async def _converse(self, sock: socket.socket) -> None:
        """Serve one connection; only cancellation leaves this function."""
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.current_task()
            wait_s = self._limits.idle_timeout_s
            while request := await self._receive_request(sock, wait_s):
                if task is not None:
                    self._new.pop(task, None)
                await self._reply(sock, *request)
                wait_s = KEEP_ALIVE_S
        except (BadFrame, OSError) as error:
            self.num_dropped_connections += 1
            log.debug("kv_server.connection_dropped", error=type(error).__name__)
        except Exception:  # the edge: one bad peer never ends the service of the others
            self.num_dropped_connections += 1
            log.exception("kv_server.connection_broken")

    async def _receive_request(
        self, sock: socket.socket, wait_s: float
    ) -> tuple[End, KvStore, list[BlockId]] | None:
        """None if the peer closes, or does not ask for `wait_s`.

        One deadline for all of it: a peer that sends a byte now and then is not waited for.
        """
        request, num_bytes = bytearray(_FIRST_RECV_BYTES), 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                num_bytes = await asyncio.get_running_loop().sock_recv_into(sock, request)
        if num_bytes == 0:
            return None
        idle_s, end = self._limits.idle_timeout_s, REQUEST_HEADER_BYTES
        async with asyncio.timeout(idle_s):
            if num_bytes < end:
                await recv_all(sock, [memoryview(request)[num_bytes:end]], idle_s)
                num_bytes = end
            reader, num_parts, num_blocks = decode_request_header(request[:end], self._token)
            memory = self._divided(num_parts)
            end += 4 * num_blocks
            request += bytes(max(0, end - len(request)))
            if num_bytes < end:
                await recv_all(sock, [memoryview(request)[num_bytes:end]], idle_s)
        if num_bytes > end:
            raise BadFrame("more than one request at a time")
        block_ids = decode_block_ids(request[REQUEST_HEADER_BYTES:end], memory.num_blocks)
        return reader, memory, block_ids

    def _divided(self, num_parts: int) -> KvStore:
        """What is served, in blocks or in parts of them; raises `BadFrame` for other parts."""
        if num_parts == 1:
            return self._memory
        if not isinstance(self._memory, KvMemory) or num_parts != self._memory.layout.num_parts:
            raise BadFrame(f"blocks in {num_parts} parts")
        return self._memory.divided(num_parts)

    def _whole(self, memory: KvStore, block_ids: Sequence[BlockId]) -> Sequence[BlockId]:
        """The blocks that these are, or are parts of."""
        if memory is self._memory:
            return block_ids
        num_parts = memory.num_blocks // self._memory.num_blocks
        return list(dict.fromkeys(BlockId(block // num_parts) for block in block_ids))

    async def _reply(
        self, sock: socket.socket, reader: End, memory: KvStore, block_ids: Sequence[BlockId]
    ) -> None:
        blocks = tuple(self._whole(memory, block_ids))
        if not await self._may_read(blocks):
            self.num_refused_reads += 1
            refusal = encode_reply(Status.NOT_ON_OFFER, 0)
            await send_all(sock, [refusal], self._limits.idle_timeout_s)
            return
        self._on_read(ReadEvent(reader, blocks, is_over=False))
        try:
            await self._send_blocks(sock, memory, block_ids)
        finally:
            self._on_read(ReadEvent(reader, blocks, is_over=True))

    async def _send_blocks(
        self, sock: socket.socket, memory: KvStore, block_ids: Sequence[BlockId]
    ) -> None:
        block_bytes = memory.layout.block_bytes
        batch_size = max(1, BYTES_PER_TURN // block_bytes)
        async with asyncio.timeout(self._limits.total_timeout_s):
            head = encode_reply(Status.OK, len(block_ids) * block_bytes)
            for first in range(0, len(block_ids), batch_size):
                batch = block_ids[first : first + batch_size]
                if first and not await self._may_read(self._whole(memory, batch)):
                    raise BadFrame("the blocks were taken back while they were sent")
                blocks = await bytes_of(memory, batch)
                await send_all(
                    sock, [head, *blocks] if not first else blocks, self._limits.idle_timeout_s
                )
