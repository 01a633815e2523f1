"""Reading a peer's memory over TCP: anywhere, no special hardware, nothing trusted."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from typing import Any

import structlog

from kvtransfer.transports.base import NOBODY, End, MayRead, OnRead, check_read, ignore
from kvtransfer.transports.divided import ReadsParts, num_parts_of
from kvtransfer.transports.requests import MAX_BLOCKS_PER_REQUEST, TokenAddress, read_within
from kvtransfer.transports.sockets import recv_all, send_all
from kvtransfer.transports.tcp_frames import (
    REPLY_HEADER_BYTES,
    Status,
    decode_reply,
    encode_request,
)
from kvtransfer.transports.tcp_server import KEEP_ALIVE_S, TcpLimits, TcpRegionServer
from pdserve.domain.errors import ReadRefused, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import KvStore, block_runs

log = structlog.get_logger(__name__)

MAX_IDLE_S = KEEP_ALIVE_S / 2
"""A pooled connection is not used after this: below the server's keep-alive."""


class _Connections:
    """The connections to one peer: `max_num` at most, each with one request at a time."""

    def __init__(self, address: TokenAddress, max_num: int) -> None:
        self.address = address
        self.slots = asyncio.Semaphore(max_num)
        self._idle: list[tuple[socket.socket, float]] = []
        self._busy: set[socket.socket] = set()
        self._is_closed = False

    async def take(self, timeout_s: float) -> socket.socket:
        """A connection that nobody else uses; give it back with `put` or `drop`.

        Raises `TransferFailed` if a new one does not open in time, `OSError` if it cannot.
        """
        if self._is_closed:
            raise ConnectionAbortedError("closed by this side")
        now_s = asyncio.get_running_loop().time()
        while self._idle:
            sock, since_s = self._idle.pop()
            if now_s - since_s < MAX_IDLE_S and _is_quiet(sock):
                self._busy.add(sock)
                return sock
            sock.close()
        try:
            async with asyncio.timeout(timeout_s):
                sock = await self._connect()
        except TimeoutError:
            message = f"the peer took no connection within {timeout_s:g} s"
            raise TransferFailed(message) from None
        self._busy.add(sock)
        return sock

    async def _connect(self) -> socket.socket:
        sock, target = await self._socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, target)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _socket(self) -> tuple[socket.socket, Any]:
        """A socket of the family that the peer's host has, and what to connect it to."""
        host, port = self.address.host, self.address.port
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # As `pdserve.config.binding.listen` prefers: a name may have both families.
        family, _, _, _, target = min(found, key=lambda each: each[0] != socket.AF_INET)
        return socket.socket(family, socket.SOCK_STREAM), target

    def put(self, sock: socket.socket) -> None:
        """Its reply was read to the end, so the next one can use it."""
        if self._is_closed:
            self.drop(sock)
            return
        self._busy.discard(sock)
        self._idle.append((sock, asyncio.get_running_loop().time()))

    def drop(self, sock: socket.socket) -> None:
        """Something may still come on it: never to be used again."""
        self._busy.discard(sock)
        sock.close()

    def close(self) -> None:
        """Close what is idle and end the reads that run, which then fail."""
        self._is_closed = True
        for sock, _ in self._idle:
            sock.close()
        self._idle.clear()
        for sock in self._busy:
            with contextlib.suppress(OSError):  # the peer was faster
                sock.shutdown(socket.SHUT_RDWR)


def _is_quiet(sock: socket.socket) -> bool:
    """Nothing to read: neither its end nor bytes that nobody asked for."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class TcpTransport(ReadsParts):
    """Serves on `host` and `port` (0: a free one); readers are told the same.

    A read fails when its connection does not open within `connect_timeout_s`, nothing moves for
    `idle_timeout_s`, or after `total_timeout_s` in all. All count from when the peer is asked:
    while all connections to it are taken by other reads, only the caller's own deadline ends the
    wait.
    """

    name = "tcp"

    def __init__(
        self, host: str = "127.0.0.1", *, limits: TcpLimits, port: int = 0, end: End = NOBODY
    ) -> None:
        self._host = host
        self._port = port
        self._end = end
        self._limits = limits
        self._peers: dict[TokenAddress, _Connections] = {}

    async def register(self, memory: KvStore) -> None:
        """What is not the host's memory goes through a copy."""

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> TcpRegionServer:
        """Listen; raises `LocalFault` where the port cannot be had."""
        host, port, limits = self._host, self._port, self._limits
        return TcpRegionServer(memory, may_read, on_read, host=host, port=port, limits=limits)

    def can_reach(self, region: RemoteRegion) -> bool:
        """Whether it is a TCP address; whether anyone answers shows at the first read."""
        with contextlib.suppress(TransferFailed):
            return region.transport == self.name and bool(TokenAddress.of(region))
        return False

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        check_read(region, remote_blocks, memory, local_blocks)
        address = TokenAddress.of(region)
        if (peer := self._peers.get(address)) is None:
            peer = _Connections(address, self._limits.max_num_connections_per_peer)
            self._peers[address] = peer
        await self._take_slot(peer)
        try:
            async with read_within(self._limits.total_timeout_s, self._limits.idle_timeout_s):
                for first in range(0, len(remote_blocks), MAX_BLOCKS_PER_REQUEST):
                    part = slice(first, first + MAX_BLOCKS_PER_REQUEST)
                    await self._read_part(
                        peer, remote_blocks[part], memory, local_blocks[part], num_parts_of(region)
                    )
        finally:
            peer.slots.release()

    async def _take_slot(self, peer: _Connections) -> None:
        """Wait for a connection of this process's own limit; a long wait is told, also if given up.

        It is no fault of the peer, which has not been asked.
        """
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        try:
            await peer.slots.acquire()
        finally:
            if (waited_s := loop.time() - since_s) > self._limits.idle_timeout_s:
                log.warning(
                    "kv_read.waited",
                    max_num_connections=self._limits.max_num_connections_per_peer,
                    waited_s=round(waited_s, 3),
                )

    async def _read_part(
        self,
        peer: _Connections,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
        num_parts: int,
    ) -> None:
        num_bytes = len(local_blocks) * memory.layout.block_bytes
        if (targets := memory.host_blocks(local_blocks)) is not None:
            try:
                await self._recv_blocks(peer, remote_blocks, num_parts, targets, num_bytes)
            finally:
                for target in targets:
                    target.release()
            return
        staging = bytearray(num_bytes)
        await self._recv_blocks(peer, remote_blocks, num_parts, [staging], num_bytes)
        runs = block_runs(range(len(local_blocks)), local_blocks)
        await memory.copy_in(staging, list(runs))

    async def _recv_blocks(
        self,
        peer: _Connections,
        remote_blocks: Sequence[BlockId],
        num_parts: int,
        targets: Sequence[bytearray | memoryview],
        num_bytes: int,
    ) -> None:
        """Ask for the blocks and fill `targets`, which have `num_bytes` in all."""
        sock = await peer.take(self._limits.connect_timeout_s)
        header, has_blocks = bytearray(REPLY_HEADER_BYTES), False

        def is_granted() -> bool:
            nonlocal has_blocks
            has_blocks = decode_reply(header, num_bytes) is Status.OK
            return has_blocks

        try:
            request = encode_request(peer.address.token, self._end, remote_blocks, num_parts)
            await send_all(sock, [request], self._limits.idle_timeout_s)
            # In one call with the blocks: what a short read waits for is turns of the event loop.
            await recv_all(sock, [header, *targets], self._limits.idle_timeout_s, is_granted)
        except BaseException:
            peer.drop(sock)
            raise
        peer.put(sock)
        if not has_blocks:
            raise ReadRefused("the peer refuses: the blocks are not on offer")

    async def close_peer(self, region: RemoteRegion) -> None:
        peer = self._peers.pop(TokenAddress.of(region), None)
        if peer is not None:
            peer.close()

    async def close(self) -> None:
        """Also ends the reads that run; servers are closed by whoever asked for them."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
