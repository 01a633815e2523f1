"""Sending and receiving lists of buffers on non-blocking sockets, with a limit on silence.

The event loop's own `sock_sendall` and `sock_recv_into` take one buffer a call. A list of
scattered blocks goes many at a time here, by `sendmsg` and `recvmsg_into`.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence

BUFFERS_PER_CALL = 256
BYTES_PER_TURN = 1 << 20
"""How much one connection moves before others get their turn of the event loop."""


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def wait_readable(sock: socket.socket, timeout_s: float) -> None:
    """Raises `TimeoutError` if nothing can be read for that long."""
    loop = asyncio.get_running_loop()
    await _wait(loop.add_reader, loop.remove_reader, sock, timeout_s)


async def wait_writable(sock: socket.socket, timeout_s: float) -> None:
    """Raises `TimeoutError` if nothing can be written for that long."""
    loop = asyncio.get_running_loop()
    await _wait(loop.add_writer, loop.remove_writer, sock, timeout_s)


async def _wait(
    add: Callable[..., None], remove: Callable[[int], object], sock: socket.socket, timeout_s: float
) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    fd = sock.fileno()
    if fd < 0:
        raise ConnectionAbortedError("closed by this side")
    add(fd, _wake, future)
    try:
        async with asyncio.timeout(timeout_s):
            await future
    finally:
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile by this side
            remove(fd)


async def send_all(
    sock: socket.socket, buffers: Sequence[bytes | memoryview], idle_timeout_s: float
) -> None:
    """Send every byte; raises `OSError`, which `TimeoutError` is one of."""
    views = [memoryview(buffer) for buffer in buffers]

    def send(batch: list[memoryview]) -> int:
        return sock.sendmsg(batch)

    await _move(sock, views, send, wait_writable, idle_timeout_s)


async def recv_all(
    sock: socket.socket, buffers: Sequence[bytearray | memoryview], idle_timeout_s: float
) -> None:
    """Fill every buffer; raises `OSError`, also if the peer closes before.

    After a cancelled call nothing is written: bytes move only between two awaits.
    """
    views = [memoryview(buffer) for buffer in buffers]  # of its own, to release

    def recv(batch: list[memoryview]) -> int:
        num_bytes: int = sock.recvmsg_into(batch)[0]
        if num_bytes == 0:
            raise ConnectionResetError("closed by the peer")
        return num_bytes

    try:
        await _move(sock, views, recv, wait_readable, idle_timeout_s)
    finally:
        for view in views:  # else a failure's traceback keeps the memory from being closed
            view.release()


async def _move(
    sock: socket.socket,
    views: list[memoryview],
    move: Callable[[list[memoryview]], int],
    wait: Callable[[socket.socket, float], Awaitable[None]],
    idle_timeout_s: float,
) -> None:
    first = 0
    turn_bytes = 0
    while first < len(views):
        try:
            num_bytes = move(views[first : first + BUFFERS_PER_CALL])
        except (BlockingIOError, InterruptedError):
            await wait(sock, idle_timeout_s)
            turn_bytes = 0
            continue
        first = _skip(views, first, num_bytes)
        turn_bytes += num_bytes
        if turn_bytes >= BYTES_PER_TURN:
            await asyncio.sleep(0)
            turn_bytes = 0


def _skip(views: list[memoryview], first: int, num_bytes: int) -> int:
    """Drop what was moved from the front; returns the index of the first view that is left."""
    while first < len(views) and num_bytes >= len(views[first]):
        num_bytes -= len(views[first])
        first += 1
    if num_bytes:
        views[first] = views[first][num_bytes:]
    return first
