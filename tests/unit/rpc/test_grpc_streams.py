"""The pumps of a gRPC stream, over calls that the test plays."""

import asyncio
from typing import Any

import grpc.aio
import pytest
import structlog

from deploy.simulated.virtual_time import virtual
from pdserve.domain.errors import WorkerLost
from pdserve.rpc.grpc_streams import GrpcStream


class PlayedCall:
    """What the peer writes is put in `coming`; what we write is in `gone`."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[Any] = asyncio.Queue()
        self.gone: list[Any] = []
        self.can_write = asyncio.Event()
        self.can_write.set()

    async def read(self) -> Any:
        return await self.coming.get()

    async def write(self, message: Any) -> None:
        await self.can_write.wait()
        self.gone.append(message)


def stream_over(call: PlayedCall) -> GrpcStream[int, int]:
    def encode(value: int) -> str:
        if value < 0:
            raise OverflowError("no encoding")
        return str(value)

    def decode(text: str) -> int:
        if text == "crash":
            raise RuntimeError("a bug of ours")
        return int(text)

    return GrpcStream(read=call.read, write=call.write, encode=encode, decode=decode, peer="peer")


@virtual
async def test_message_that_makes_no_sense_is_logged_and_dropped() -> None:
    call = PlayedCall()
    stream = stream_over(call)
    for text in ("1", "nonsense", "2"):
        call.coming.put_nowait(text)
    with structlog.testing.capture_logs() as logs:
        assert [await stream.receive(), await stream.receive()] == [1, 2]
    assert [entry["event"] for entry in logs] == ["stream.message_dropped"]
    await stream.close()


@virtual
async def test_message_of_ours_without_encoding_ends_the_stream_instead_of_stalling_it() -> None:
    stream = stream_over(PlayedCall())
    with structlog.testing.capture_logs() as logs:
        await stream.send(-1)
        with pytest.raises(WorkerLost):
            await stream.receive()
    assert [entry["event"] for entry in logs] == ["stream.crashed"]
    assert not stream.try_send(1)
    await stream.close()


@virtual
async def test_crash_while_decoding_ends_the_stream_and_is_logged() -> None:
    call = PlayedCall()
    stream = stream_over(call)
    call.coming.put_nowait("crash")
    with structlog.testing.capture_logs() as logs, pytest.raises(WorkerLost):
        await stream.receive()
    assert [entry["event"] for entry in logs] == ["stream.crashed"]
    await stream.close()


@virtual
async def test_close_sends_what_is_queued_and_waits_for_a_stuck_peer_only_so_long() -> None:
    call = PlayedCall()
    stream = stream_over(call)
    for value in range(3):
        assert stream.try_send(value)
    await stream.close()
    assert call.gone == ["0", "1", "2"]

    stuck = PlayedCall()
    stuck.can_write.clear()
    stream = stream_over(stuck)
    stream.try_send(0)
    with structlog.testing.capture_logs():
        async with asyncio.timeout(1.5):
            await stream.close()


@pytest.mark.parametrize("how", ["eof", "abort"])
def test_end_of_the_stream_reaches_whoever_waits(how: str) -> None:
    @virtual
    async def run() -> None:
        call = PlayedCall()
        call.can_write.clear()
        stream = stream_over(call)
        receiving = asyncio.create_task(stream.receive())
        await asyncio.sleep(0.1)
        if how == "eof":
            call.coming.put_nowait(grpc.aio.EOF)  # type: ignore[attr-defined]
        else:
            stream.abort()
        with pytest.raises(WorkerLost):
            await receiving
        with structlog.testing.capture_logs():
            await stream.close()

    run()
