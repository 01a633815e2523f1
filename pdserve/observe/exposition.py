"""The port that Prometheus scrapes: plain HTTP, read-only, each connection short and counted."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import structlog

from pdserve.config.binding import explain_listening, listen
from pdserve.domain.addresses import join_address
from pdserve.domain.errors import LocalFault

log = structlog.get_logger(__name__)

CONNECTION_S = 10.0
"""From accepting a connection to its last byte; Prometheus gives up after 10 s itself."""
MAX_NUM_CONNECTIONS = 16
MAX_REQUEST_BYTES = 16_384
LAG_EVERY_S = 0.25
PATH = "/metrics"


class Exposed(Protocol):
    """What is served; see `pdserve.observe.prometheus.ProcessMetrics`."""

    def refresh(self) -> None: ...

    def render(self, accept: str) -> tuple[bytes, str]: ...

    def loop_was_late(self, lag_s: float) -> None: ...


@contextlib.asynccontextmanager
async def serve_metrics(metrics: Exposed, host: str, port: int | None) -> AsyncIterator[str]:
    """Serve `metrics` for as long as the block runs; yields host:port, "" where `port` is None.

    Raises `LocalFault` where the port cannot be had. Port 0 picks a free one.
    """
    if port is None:
        yield ""
        return
    server = _MetricsServer(metrics)
    try:
        socket = listen(host, port)
    except OSError as error:
        raise LocalFault(
            f"metrics: cannot listen on {explain_listening(host, port, error)}; choose another "
            "metrics_port, or null for none"
        ) from None
    address = join_address(host, socket.getsockname()[1])
    listening = await asyncio.start_server(server.answer, sock=socket, limit=MAX_REQUEST_BYTES)
    lag = asyncio.create_task(_measure_lag(metrics.loop_was_late))
    try:
        yield address
    finally:
        lag.cancel()
        listening.close()
        await server.close()
        await asyncio.wait([lag])


class _MetricsServer:
    """Answers connections; owns their tasks."""

    def __init__(self, metrics: Exposed) -> None:
        self._metrics = metrics
        self._answering: set[asyncio.Task[None]] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._answering) >= MAX_NUM_CONNECTIONS:
            writer.transport.abort()
            return
        self._answering.add(task)
        try:
            async with asyncio.timeout(CONNECTION_S):
                writer.write(await self._reply(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # whoever asked has gone, or is too slow
        finally:
            writer.transport.abort()
            self._answering.discard(task)

    async def close(self) -> None:
        """End every connection at once."""
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    async def _reply(self, reader: asyncio.StreamReader) -> bytes:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, *headers = head.split("\r\n")
        method, _, rest = request.partition(" ")
        target, _, version = rest.rpartition(" ")
        if not version.startswith("HTTP/1."):
            return _response("400 Bad Request", b"this is not HTTP/1\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", b"only GET\n", "Allow: GET, HEAD\r\n")
        if target.partition("?")[0] != PATH:
            return _response("404 Not Found", f"only {PATH}\n".encode())
        self._metrics.refresh()
        # Text for a few hundred series takes milliseconds: steps go on meanwhile.
        body, kind = await asyncio.to_thread(self._metrics.render, _accept(headers))
        return _response("200 OK", body, kind=kind, is_head=method == "HEAD")


def _accept(headers: list[str]) -> str:
    for header in headers:
        name, _, value = header.partition(":")
        if name.strip().lower() == "accept":
            return value.strip()
    return ""


def _response(
    status: str,
    body: bytes,
    more: str = "",
    *,
    kind: str = "text/plain; charset=utf-8",
    is_head: bool = False,
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"{more}Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if is_head else body)


async def _measure_lag(was_late: Callable[[float], None]) -> None:
    """How much later than asked the loop wakes up, again and again until cancelled."""
    while True:
        due_s = time.monotonic() + LAG_EVERY_S  # uvloop's own clock counts whole milliseconds
        await asyncio.sleep(LAG_EVERY_S)
        was_late(max(0.0, time.monotonic() - due_s))
