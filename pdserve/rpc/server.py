"""A gRPC server with health, reflection and one rule for unexpected exceptions."""

import contextlib
import inspect
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.config.binding import explain_listening, listen
from pdserve.config.timers import Timers
from pdserve.domain.addresses import is_loopback, join_address
from pdserve.domain.errors import BadRequest, FieldViolation, LocalFault, PdserveError
from pdserve.rpc.channels import server_options
from pdserve.rpc.errors import abort
from pdserve.rpc.health import ProcessHealth
from pdserve.rpc.links import AddService

log = structlog.get_logger(__name__)

UNREADABLE = object()
"""In place of a request that could not be parsed."""


class RpcServer:
    """A started server. Readiness off first, then `close`."""

    def __init__(self, server: grpc.aio.Server, health: ProcessHealth, address: str) -> None:
        self._server = server
        self.health = health
        self.address = address

    @classmethod
    async def start(
        cls,
        host: str,
        port: int,
        services: Iterable[AddService],
        timers: Timers,
        *,
        max_message_bytes: int,
        is_ready: bool = True,
    ) -> "RpcServer":
        """Bind and serve; raises `LocalFault` naming the address if it is taken."""
        server = grpc.aio.server(
            interceptors=(OpaqueErrors(),),
            options=server_options(timers, max_message_bytes=max_message_bytes),
        )
        health_servicer = ProcessHealth()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        names = [add(server) for add in services]
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
        )
        try:
            bound = server.add_insecure_port(join_address(host, port))
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise LocalFault(f"cannot listen on {_why_not(host, port)}; choose another")
        address = join_address(host, bound)
        if not is_loopback(host):
            log.warning(
                "binding.insecure",
                address=address,
                advice="no TLS, no login: only trusted machines may reach this port",
            )
        await server.start()
        started = cls(server, health_servicer, address)
        await started.health.set_ready(is_ready)
        return started

    async def close(self, grace_s: float = 0.0) -> None:
        await self._server.stop(grace_s)

    async def __aenter__(self) -> "RpcServer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _why_not(host: str, port: int) -> str:
    """gRPC does not say why it could not listen; the system does."""
    try:
        listen(host, port).close()
    except OSError as error:
        return explain_listening(host, port, error)
    return f"{join_address(host, port)}: gRPC could not take the port"


class OpaqueErrors(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Known errors become their status; anything else becomes INTERNAL with an id, logged here.

    Without this grpc.aio sends the text of an exception to the client, prompt included.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        parse = _lenient(handler.request_deserializer)
        if handler.unary_unary:
            wrapped = _guard_call(handler.unary_unary, method)
            make = grpc.unary_unary_rpc_method_handler
        elif handler.unary_stream:
            wrapped = _guard_stream(handler.unary_stream, method)
            make = grpc.unary_stream_rpc_method_handler
        elif handler.stream_stream:
            wrapped = _guard_stream(handler.stream_stream, method)
            make = grpc.stream_stream_rpc_method_handler
            parse = handler.request_deserializer  # read, and so parsed, by the handler itself
        else:
            return handler
        return make(wrapped, parse, handler.response_serializer)


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Messages are parsed before our handlers run: there, too, an exception's text would leak."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:  # noqa: BLE001  what a parser raises is its own affair
            return UNREADABLE

    return parse


def _check_readable(request: Any) -> None:
    if request is UNREADABLE:
        violation = FieldViolation("request", "must be a valid message with text in UTF-8")
        raise BadRequest.of([violation])


def _guard_call(inner: Any, method: str) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            _check_readable(request)
            return await inner(request, context)
        except Exception as error:  # noqa: BLE001
            await _reply_with(context, error, method)

    return guarded


def _guard_stream(inner: Any, method: str) -> Any:
    """Streams answer either as async generators or by `context.write`."""

    async def guarded(request: Any, context: Any) -> Any:
        try:
            _check_readable(request)
            async for reply in inner(request, context):
                yield reply
        except Exception as error:  # noqa: BLE001
            await _reply_with(context, error, method)

    return guarded if inspect.isasyncgenfunction(inner) else _guard_call(inner, method)


async def _reply_with(context: Any, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, PdserveError):
        error_id = uuid.uuid4().hex[:12]
        with contextlib.suppress(Exception):  # its text, too, would go to the client
            log.error("call.crashed", method=method, error_id=error_id, exc_info=error)
        error = LocalFault(f"internal error, id={error_id}")
    await abort(context, error)
