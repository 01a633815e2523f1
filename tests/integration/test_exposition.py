"""The metrics port, with whatever comes to it."""

import asyncio

import pytest

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import PROTOCOL_VERSION
from pdserve.observe import exposition
from pdserve.observe.exposition import MAX_NUM_CONNECTIONS, serve_metrics
from pdserve.observe.metrics import Process
from pdserve.observe.prometheus import ProcessMetrics
from tests.support.waiting import wait_until

HOST = "127.0.0.1"


class CountedMetrics(ProcessMetrics):
    def __init__(self) -> None:
        super().__init__(Process.DECODE, "decode-0")
        self.num_refreshed = 0
        self.lags_s: list[float] = []

    def refresh(self) -> None:
        self.num_refreshed += 1
        self._is_draining.set(self.num_refreshed)

    def loop_was_late(self, lag_s: float) -> None:
        self.lags_s.append(lag_s)


async def send(address: str, request: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


async def test_live_values_are_read_at_each_scrape() -> None:
    metrics = CountedMetrics()
    async with serve_metrics(metrics, HOST, 0) as address:
        for scrape in (1, 2):
            head, _, body = (await send(address, get("/metrics"))).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert f"Content-Length: {len(body)}".encode() in head
            assert f"pdserve_draining {scrape}.0".encode() in body
            assert f'wire_version="{PROTOCOL_VERSION}"'.encode() in body
            assert b"_created" not in body


async def test_openmetrics_is_served_to_those_who_ask_for_it() -> None:
    accept = "Accept: application/openmetrics-text; version=1.0.0"
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        reply = await send(address, get("/metrics?x=1", accept))
    assert b"application/openmetrics-text" in reply
    assert reply.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (get("/"), b"404"),
        (get("/metrics", method="POST"), b"405"),
        (get("/metrics", method="DELETE"), b"405"),
        (b"\x16\x03\x01 TLS\r\n\r\n", b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
    ],
)
async def test_all_but_a_get_of_the_metrics_is_refused(request_text: bytes, status: bytes) -> None:
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        assert (await send(address, request_text)).startswith(b"HTTP/1.1 " + status)


async def test_head_has_no_body() -> None:
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        reply = await send(address, get("/metrics", method="HEAD"))
    assert reply.startswith(b"HTTP/1.1 200")
    assert reply.endswith(b"\r\n\r\n")


async def test_endless_request_is_cut() -> None:
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        try:
            reply = await send(address, b"GET /metrics HTTP/1.1\r\nA: " + b"a" * 100_000)
        except ConnectionError:
            reply = b""
        assert reply == b""
        assert b"200 OK" in await send(address, get("/metrics"))


async def test_silent_connection_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "CONNECTION_S", 0.1)
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        assert await send(address, b"GET /met") == b""


async def test_flood_of_connections_is_bounded_and_leaves_room_again() -> None:
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        port = int(address.rpartition(":")[2])
        idle = [await asyncio.open_connection(HOST, port) for _ in range(MAX_NUM_CONNECTIONS)]
        reader, writer = await asyncio.open_connection(HOST, port)
        assert await rest_of(reader) == b""
        writer.close()
        for _, writer in idle:
            writer.close()
        async with asyncio.timeout(5):
            while b"200 OK" not in await quiet_send(address):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def quiet_send(address: str) -> bytes:
    try:
        return await send(address, get("/metrics"))
    except ConnectionError:
        return b""


async def test_leaving_ends_open_connections_and_frees_the_port() -> None:
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        port = int(address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET ")
    assert await rest_of(reader) == b""
    writer.close()
    async with serve_metrics(CountedMetrics(), HOST, port) as again:
        assert again == address


async def test_taken_port_is_told_with_its_setting() -> None:
    async with serve_metrics(CountedMetrics(), HOST, 0) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(LocalFault, match=f"{port}.*metrics_port"):
            async with serve_metrics(CountedMetrics(), HOST, port):
                pass


async def test_no_port_serves_nothing() -> None:
    async with serve_metrics(CountedMetrics(), HOST, None) as address:
        assert address == ""


async def test_a_blocked_loop_is_seen() -> None:
    metrics = CountedMetrics()
    async with serve_metrics(metrics, HOST, 0):
        await wait_until(lambda: len(metrics.lags_s) > 0, within_s=5, what="the first reading")
        seen = len(metrics.lags_s)
        block_s = 0.6
        end_s = asyncio.get_running_loop().time() + block_s
        while asyncio.get_running_loop().time() < end_s:
            pass
        await wait_until(lambda: len(metrics.lags_s) > seen, within_s=5, what="the next reading")
    assert max(metrics.lags_s[seen:]) > 0.3  # it was due at most 0.25 s after the block began
