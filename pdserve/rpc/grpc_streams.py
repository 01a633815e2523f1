"""gRPC bidirectional calls as message streams.

grpc.aio cancels the whole call when a task is cancelled inside its `read` or `write`. One stream
carries many requests, so only the stream's own pumps touch the call; everyone else uses mailboxes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc.aio
import structlog

from pdserve.domain.errors import Reason, WorkerLost
from pdserve.rpc.off_loop import off_loop
from pdserve.rpc.streams import Mailbox, MailboxStream

Out = TypeVar("Out")
In = TypeVar("In")

log = structlog.get_logger(__name__)

CLOSE_FLUSH_S = 1.0


class GrpcStream(MailboxStream[Out, In]):
    """A `MessageStream` over one call, client or server side.

    `read` returns protobuf messages and `grpc.aio.EOF` at the end; `decode` raises `ValueError`
    for a message that makes no sense: it is logged and dropped, the stream goes on.
    `num_tokens` tells how long a prompt a message holds, on either side of the codec.
    """

    def __init__(
        self,
        *,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[Any], Awaitable[None]],
        encode: Callable[[Out], Any],
        decode: Callable[[Any], In],
        peer: str,
        num_tokens: Callable[[object], int] = lambda message: 0,
    ) -> None:
        super().__init__(Mailbox(), Mailbox(), peer)
        self._read = read
        self._write = write
        self._encode = encode
        self._decode = decode
        self._num_tokens = num_tokens
        self._writer = asyncio.create_task(self._pump_out())
        self._reader = asyncio.create_task(self._pump_in())

    async def close(self) -> None:
        self._outgoing.end()
        try:
            async with asyncio.timeout(CLOSE_FLUSH_S):
                await asyncio.wait([self._writer])
        except TimeoutError:
            log.warning("stream.flush_abandoned", peer=self.peer)
        finally:
            self.abort()
            self._reader.cancel()
            self._writer.cancel()
            await asyncio.wait([self._reader, self._writer])

    async def _pump_out(self) -> None:
        try:
            while (message := await self._outgoing.take()) is not None:
                await self._write(await off_loop(self._num_tokens(message), self._encode, message))
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            return  # the reader says why
        except Exception as error:  # a message of ours that has no encoding: nobody is left waiting
            log.error("stream.crashed", peer=self.peer, exc_info=error)
        finally:
            self.abort()

    async def _pump_in(self) -> None:
        try:
            while (message := await self._read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                try:
                    value = await off_loop(self._num_tokens(message), self._decode, message)
                except ValueError as error:
                    log.warning("stream.message_dropped", peer=self.peer, why=str(error))
                    continue
                await self._incoming.put(value)
        except grpc.aio.AioRpcError as error:  # our own peers' status, for the log
            self._why_over = f"ended the stream: {error.details() or error.code().name}"
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                self._reason_over = Reason.INCOMPATIBLE_PEER
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            self._why_over = f"broke the stream ({type(error).__name__})"
        except Exception as error:
            log.error("stream.crashed", peer=self.peer, exc_info=error)
        finally:
            self.abort()


class ClientStream(GrpcStream[Out, In]):
    """The calling end; owns its channel."""

    def __init__(self, channel: grpc.aio.Channel, call: Any, **kwargs: Any) -> None:
        super().__init__(read=call.read, write=call.write, **kwargs)
        self._channel = channel
        self._call = call

    @classmethod
    async def open(
        cls,
        channel: grpc.aio.Channel,
        method: Callable[[], Any],
        *,
        connect_s: float,
        encode: Callable[[Out], Any],
        decode: Callable[[Any], In],
        peer: str,
        num_tokens: Callable[[object], int] = lambda message: 0,
    ) -> "ClientStream[Out, In]":
        """Start the call and wait until the server has taken it; raises `WorkerLost`."""
        call = method()
        try:
            async with asyncio.timeout(connect_s):
                await call.wait_for_connection()
        except BaseException as error:
            call.cancel()
            await channel.close(None)
            if isinstance(error, TimeoutError | grpc.RpcError):
                raise WorkerLost(f"{peer} does not answer") from None
            raise
        return cls(channel, call, encode=encode, decode=decode, peer=peer, num_tokens=num_tokens)

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            self._call.cancel()
            await self._channel.close(None)


async def serve_stream(
    context: Any,
    handler: Callable[[GrpcStream[Out, In]], Awaitable[None]],
    *,
    encode: Callable[[Out], Any],
    decode: Callable[[Any], In],
    num_tokens: Callable[[object], int] = lambda message: 0,
) -> None:
    """Run `handler` over a server-side call; both end together."""
    await context.send_initial_metadata(())
    stream: GrpcStream[Out, In] = GrpcStream(
        read=context.read,
        write=context.write,
        encode=encode,
        decode=decode,
        peer=context.peer(),
        num_tokens=num_tokens,
    )
    try:
        await handler(stream)
    finally:
        await stream.close()
