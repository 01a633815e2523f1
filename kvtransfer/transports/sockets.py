"""Sending and receiving lists of buffers on non-blocking sockets, with a limit on silence.

The event loop's own `sock_sendall` and `sock_recv_into` take one buffer a call. A list of
scattered blocks goes many at a time here, by `sendmsg` and `recvmsg_into`.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

BUFFERS_PER_CALL = 256
BYTES_PER_CALL = 512 << 10
"""What is in flight at a time stays in the caches: larger calls are a fifth slower on one host."""
BYTES_PER_TURN = 4 << 20
"""How much one connection moves before others get their turn of the event loop."""


async def send_all(
    sock: socket.socket, buffers: Sequence[bytes | memoryview], idle_timeout_s: float
) -> None:
    """Send every byte; raises `OSError`, which `TimeoutError` is one of."""
    loop = asyncio.get_running_loop()
    await _move(sock, buffers, sock.sendmsg, loop.add_writer, loop.remove_writer, idle_timeout_s)


async def recv_all(
    sock: socket.socket,
    buffers: Sequence[bytearray | memoryview],
    idle_timeout_s: float,
    goes_on: Callable[[], bool] | None = None,
) -> None:
    """Fill every buffer; raises `OSError`, also if the peer closes before.

    `goes_on` is asked once, when the first buffer is full: if it says no, that was all. From the
    moment when the call is cancelled nothing is written any more.
    """

    def recv(batch: list[memoryview]) -> int:
        if num_bytes := sock.recvmsg_into(batch)[0]:
            return num_bytes
        raise ConnectionResetError("closed by the peer")

    loop = asyncio.get_running_loop()
    watch, unwatch = loop.add_reader, loop.remove_reader
    await _move(sock, buffers, recv, watch, unwatch, idle_timeout_s, goes_on)


async def _move(
    sock: socket.socket,
    buffers: Sequence[bytes | bytearray | memoryview],
    move: Callable[[list[memoryview]], int],
    watch: Callable[..., object],
    unwatch: Callable[[int], object],
    idle_timeout_s: float,
    goes_on: Callable[[], bool] | None = None,
) -> None:
    """`move` what goes at once, then wait for the socket. All buffers but the first are alike."""
    views = [memoryview(buffer) for buffer in buffers if buffer]  # of its own, to release
    count = max(1, min(BUFFERS_PER_CALL, BYTES_PER_CALL // max(1, len(views[-1]))))
    first = moved = 0
    try:
        while first < len(views):
            try:
                num_bytes = move(views[first : first + count])
            except (BlockingIOError, InterruptedError):
                num_bytes, moved = 0, BYTES_PER_TURN
            moved += num_bytes
            while first < len(views) and num_bytes >= len(views[first]):
                num_bytes -= len(views[first])
                first += 1
            if num_bytes:
                views[first] = views[first][num_bytes:]
            if first and goes_on is not None:
                asked, goes_on = goes_on, None
                if not asked():
                    return
            if moved >= BYTES_PER_TURN and first < len(views):
                await _until_ready(sock.fileno(), watch, unwatch, idle_timeout_s)
                moved = 0
    finally:
        for view in views:  # else a failure's traceback keeps the memory from being closed
            view.release()


async def _until_ready(
    fd: int, watch: Callable[..., object], unwatch: Callable[[int], object], timeout_s: float
) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[bool] = loop.create_future()  # cancelled with the caller

    def end(is_ready: bool) -> None:
        if not ready.done():
            ready.set_result(is_ready)

    timer = loop.call_later(timeout_s, end, False)
    watch(fd, end, True)
    try:
        if not await ready:
            raise TimeoutError
    finally:
        timer.cancel()
        with contextlib.suppress(ValueError, OSError):  # closed by this side
            unwatch(fd)
