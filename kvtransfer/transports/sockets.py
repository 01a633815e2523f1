"""Sending and receiving lists of buffers on non-blocking sockets, with a limit on silence."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pdserve.engine.threads import run_to_end

LITTLE_BYTES = 64 << 10
BUFFERS_PER_CALL = 256


class Mover:
    """Moves a little from the event loop, and much from a thread.

    The loop does other things meanwhile, and the kernel does not wait for a turn of it. Calls raise
    `OSError`, which `TimeoutError` is one of: nothing moved for `idle_timeout_s`.
    """

    def __init__(self, idle_timeout_s: float, max_num_threads: int) -> None:
        self.idle_timeout_s = idle_timeout_s
        self._threads = ThreadPoolExecutor(max_num_threads, "kv-move")
        self._is_closed = False

    async def send(self, sock: socket.socket, buffers: Sequence[bytes | memoryview]) -> None:
        """Send every byte."""
        if sum(map(len, buffers)) > LITTLE_BYTES:
            await self._move(sock, buffers, sock.sendmsg)
            return
        async with asyncio.timeout(self.idle_timeout_s):
            await asyncio.get_running_loop().sock_sendall(sock, b"".join(buffers))

    async def receive(self, sock: socket.socket, buffers: Sequence[bytearray | memoryview]) -> None:
        """Fill every buffer; an error if the peer closes before.

        Once a cancelled call has raised, nothing is written any more.
        """
        if sum(map(len, buffers)) > LITTLE_BYTES:
            await self._move(sock, buffers, lambda views: sock.recvmsg_into(views)[0])
            return
        loop = asyncio.get_running_loop()
        for buffer in buffers:
            with memoryview(buffer) as view:
                first = 0
                while first < len(view):
                    async with asyncio.timeout(self.idle_timeout_s):
                        first += _some(await loop.sock_recv_into(sock, view[first:]))

    async def _move(
        self,
        sock: socket.socket,
        buffers: Sequence[bytes | bytearray | memoryview],
        move: Callable[[list[memoryview]], int],
    ) -> None:
        """`move` what is left, again and again; a cancelled call ends the connection."""
        if self._is_closed:
            raise ConnectionAbortedError("closed by this side")

        def work(is_cancelled: Callable[[], bool]) -> None:
            views = [memoryview(buffer) for buffer in buffers]  # of its own, to release
            sock.settimeout(self.idle_timeout_s)
            try:
                first = 0
                while first < len(views) and not is_cancelled():
                    batch = views[first : first + BUFFERS_PER_CALL]
                    first = _skip(views, first, _some(move(batch)))
            finally:
                sock.setblocking(False)
                for view in views:  # else a failure's traceback keeps the memory from being closed
                    view.release()

        await run_to_end(work, self._threads, lambda: sock.shutdown(socket.SHUT_RDWR))

    def close(self) -> None:
        """What still moves goes on to its end."""
        self._is_closed = True
        self._threads.shutdown(wait=False)


def _some(num_bytes: int) -> int:
    if not num_bytes:
        raise ConnectionResetError("closed by the peer")
    return num_bytes


def _skip(views: list[memoryview], first: int, num_bytes: int) -> int:
    """Drop what was moved from the front; returns the index of the first view that is left."""
    while first < len(views) and num_bytes >= len(views[first]):
        num_bytes -= len(views[first])
        first += 1
    if num_bytes:
        views[first] = views[first][num_bytes:]
    return first
