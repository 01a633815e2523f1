"""The internal services over real gRPC on loopback."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc.aio
import pytest
import structlog

from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault, Refused, WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, RequestId
from pdserve.domain.messages import Cancel, PeerHello, RequestOutput, StepOutputs
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES
from pdserve.rpc.links import connect_decode, decode_service
from pdserve.rpc.server import RpcServer
from pdserve.rpc.streams import DecodeServerLink, iterate, send_or_abort
from pdserve.v1 import decode_pb2, decode_pb2_grpc

TIMERS = Timers(keepalive_s=0.5, connect_s=1.0)


class EchoDecode:
    """Answers each cancel with an output of the same name; notes when a stream ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def handle(self, stream: DecodeServerLink) -> None:
        try:
            async for message in iterate(stream):
                match message:
                    case PeerHello():
                        await stream.send(message)
                    case Cancel(request_id="crash"):
                        raise RuntimeError("a prompt that must not leak")
                    case Cancel(request_id="refuse"):
                        raise Refused("queue holds 3 of 3 requests", retry_after_s=1.5)
                    case Cancel():
                        output = RequestOutput(
                            request_id=message.request_id, attempt=message.attempt, first_index=0
                        )
                        await stream.send(StepOutputs((output,)))
                    case _:
                        pass
        finally:
            self.ended.set()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[EchoDecode, RpcServer]]:
    decode = EchoDecode()
    async with await RpcServer.start(
        "127.0.0.1",
        0,
        [decode_service(decode.handle)],
        TIMERS,
        max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
    ) as server:
        yield decode, server


async def test_messages_arrive_in_order_both_ways(echo: tuple[EchoDecode, RpcServer]) -> None:
    link = await connect_decode(echo[1].address, TIMERS)
    hello = PeerHello(peer_id="r", epoch=Epoch(2**63), protocol_version=PROTOCOL_VERSION)
    await link.send(hello)
    for index in range(2000):
        await link.send(Cancel(request_id=RequestId(str(index)), attempt=1))
    assert await link.receive() == hello
    for index in range(2000):
        outputs = await link.receive()
        assert isinstance(outputs, StepOutputs)
        assert outputs.outputs[0].request_id == str(index)
    await link.close()
    async with asyncio.timeout(2):
        await echo[0].ended.wait()


async def test_cancelled_receiver_leaves_the_stream_intact(
    echo: tuple[EchoDecode, RpcServer],
) -> None:
    link = await connect_decode(echo[1].address, TIMERS)
    waiting = asyncio.create_task(link.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await link.send(Cancel(request_id=RequestId("a"), attempt=1))
    outputs = await link.receive()
    assert isinstance(outputs, StepOutputs)
    await link.close()


async def test_message_without_meaning_is_dropped_and_the_stream_goes_on(
    echo: tuple[EchoDecode, RpcServer],
) -> None:
    async with grpc.aio.insecure_channel(echo[1].address) as channel:
        call = decode_pb2_grpc.DecodeStub(channel).Serve()  # type: ignore[no-untyped-call]
        await call.write(decode_pb2.RouterMessage())
        cancel = decode_pb2.Cancel(request_id="a", attempt=1)
        await call.write(decode_pb2.RouterMessage(cancel=cancel))
        reply = await call.read()
        assert reply.outputs.outputs[0].request_id == "a"


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("crash", grpc.StatusCode.INTERNAL, "internal error, id="),
        ("refuse", grpc.StatusCode.RESOURCE_EXHAUSTED, "queue holds 3 of 3 requests"),
    ],
)
async def test_handler_errors_become_opaque_status(
    echo: tuple[EchoDecode, RpcServer], name: str, code: grpc.StatusCode, text: str
) -> None:
    async with grpc.aio.insecure_channel(echo[1].address) as channel:
        call = decode_pb2_grpc.DecodeStub(channel).Serve()  # type: ignore[no-untyped-call]
        await call.write(decode_pb2.RouterMessage(cancel=decode_pb2.Cancel(request_id=name)))
        assert await call.code() == code
        details = await call.details()
        assert text in details
        assert "prompt" not in details


async def turns() -> AsyncIterator[None]:
    """Lets everything else run between two rounds of a loop."""
    while True:
        await asyncio.sleep(0)
        yield


async def test_stream_whose_far_end_does_not_read_ends_there_too_when_a_message_is_unsent() -> None:
    ended = asyncio.Event()

    async def hold(stream: DecodeServerLink) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    limit = MAX_INTERNAL_MESSAGE_BYTES
    async with await RpcServer.start(
        "127.0.0.1", 0, [decode_service(hold)], TIMERS, max_message_bytes=limit
    ) as server:
        link = await connect_decode(server.address, TIMERS)
        cancel = Cancel(request_id=RequestId("x" * 10_000), attempt=1)
        async with asyncio.timeout(10):
            async for _ in turns():
                if not send_or_abort(link, cancel):
                    break
            with pytest.raises(WorkerLost):
                await link.receive()
        await link.close()
        async with asyncio.timeout(2):
            await ended.wait()


async def test_request_that_cannot_be_parsed_is_refused_without_the_parsers_words(
    echo: tuple[EchoDecode, RpcServer],
) -> None:
    async with grpc.aio.insecure_channel(echo[1].address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        call = check(b"\xff\xff\xff")
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "request: must be a valid message with text in UTF-8"


async def test_failing_log_does_not_put_its_own_text_into_the_reply(
    echo: tuple[EchoDecode, RpcServer],
) -> None:
    def no_space(*_: object) -> NoReturn:
        raise OSError("No space left for a prompt")

    structlog.configure(processors=[no_space])
    try:
        async with grpc.aio.insecure_channel(echo[1].address) as channel:
            call = decode_pb2_grpc.DecodeStub(channel).Serve()  # type: ignore[no-untyped-call]
            cancel = decode_pb2.Cancel(request_id="crash")
            await call.write(decode_pb2.RouterMessage(cancel=cancel))
            assert await call.code() == grpc.StatusCode.INTERNAL
            assert (await call.details()).startswith("internal error, id=")
    finally:
        structlog.reset_defaults()


async def test_nobody_listening_is_worker_lost() -> None:
    with pytest.raises(WorkerLost):
        await connect_decode("127.0.0.1:1", TIMERS)


async def test_port_in_use_is_a_clear_error(echo: tuple[EchoDecode, RpcServer]) -> None:
    port = int(echo[1].address.rpartition(":")[2])
    with pytest.raises(LocalFault, match=rf"127.0.0.1:{port}.*in use"):
        await RpcServer.start("127.0.0.1", port, [], TIMERS, max_message_bytes=1 << 20)


SERVER_PROCESS = """
import asyncio
from pdserve.config.timers import Timers
from pdserve.rpc.links import decode_service
from pdserve.rpc.server import RpcServer

async def hold(stream):
    await asyncio.Event().wait()

async def main():
    server = await RpcServer.start(
        "127.0.0.1", 0, [decode_service(hold)], Timers(), max_message_bytes=1 << 20
    )
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_dead_or_stopped_peer_ends_the_stream_within_three_seconds(
    number: signal.Signals,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER_PROCESS], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = await asyncio.to_thread(process.stdout.readline)
        link = await connect_decode(address.strip(), TIMERS)
        os.kill(process.pid, number)
        with pytest.raises(WorkerLost):
            async with asyncio.timeout(3):
                await link.receive()
        await link.close()
    finally:
        process.kill()
        process.communicate()
