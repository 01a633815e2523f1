"""Sending and receiving lists of buffers on non-blocking sockets, with a limit on silence.

The event loop's own `sock_sendall` and `sock_recv_into` take one buffer a call. A list of
scattered blocks goes many at a time here, by `sendmsg` and `recvmsg_into`.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

BUFFERS_PER_CALL = 256
BYTES_PER_CALL = 4 << 20
"""How much one connection moves before others get their turn of the event loop."""


async def send_all(
    sock: socket.socket, buffers: Sequence[bytes | memoryview], idle_timeout_s: float
) -> None:
    """Send every byte; raises `OSError`, which `TimeoutError` is one of."""
    loop = asyncio.get_running_loop()
    await _move(sock, buffers, sock.sendmsg, loop.add_writer, loop.remove_writer, idle_timeout_s)


async def recv_all(
    sock: socket.socket, buffers: Sequence[bytearray | memoryview], idle_timeout_s: float
) -> None:
    """Fill every buffer; raises `OSError`, also if the peer closes before.

    From the moment when the call is cancelled nothing is written any more.
    """

    def recv(batch: list[memoryview]) -> int:
        if num_bytes := sock.recvmsg_into(batch)[0]:
            return num_bytes
        raise ConnectionResetError("closed by the peer")

    loop = asyncio.get_running_loop()
    await _move(sock, buffers, recv, loop.add_reader, loop.remove_reader, idle_timeout_s)


async def _move(
    sock: socket.socket,
    buffers: Sequence[bytes | bytearray | memoryview],
    move: Callable[[list[memoryview]], int],
    watch: Callable[..., object],
    unwatch: Callable[[int], object],
    idle_timeout_s: float,
) -> None:
    """`move` some of what is left in every turn of the loop in which the socket is ready.

    All buffers but the first are of one size.
    """
    loop = asyncio.get_running_loop()
    views = [memoryview(buffer) for buffer in buffers]  # of its own, to release
    count = max(1, min(BUFFERS_PER_CALL, BYTES_PER_CALL // max(1, len(views[-1]))))
    first = _skip(views, 0, 0)
    done: asyncio.Future[None] = loop.create_future()  # cancelled with the caller
    moved_s = loop.time()

    def turn() -> None:
        nonlocal first, moved_s
        if done.done():
            return
        try:
            if first < len(views):
                first = _skip(views, first, move(views[first : first + count]))
            if first == len(views):
                done.set_result(None)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:  # raised where it is awaited
            done.set_exception(error)
        else:
            moved_s = loop.time()

    timer = loop.call_later(idle_timeout_s, lambda: look())

    def look() -> None:
        """One timer that is set anew when it ends costs less than one for each turn."""
        nonlocal timer
        if (left_s := moved_s + idle_timeout_s - loop.time()) > 0:
            timer = loop.call_later(left_s, look)
        elif not done.done():
            done.set_exception(TimeoutError())

    try:
        turn()
        if not done.done():
            watch(fd := sock.fileno(), turn)
            try:
                await done
            finally:
                with contextlib.suppress(ValueError, OSError):  # closed by this side
                    unwatch(fd)
        done.result()
    finally:
        timer.cancel()
        for view in views:  # else a failure's traceback keeps the memory from being closed
            view.release()


def _skip(views: list[memoryview], first: int, num_bytes: int) -> int:
    """Drop what was moved from the front; returns the index of the first view that is left."""
    while first < len(views) and num_bytes >= len(views[first]):
        num_bytes -= len(views[first])
        first += 1
    if num_bytes:
        views[first] = views[first][num_bytes:]
    return first
