"""From a failed call to the error that its server meant."""

from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from pdserve.client.faults import ClusterUnreachable
from pdserve.domain.errors import (
    ERROR_DOMAIN,
    BadRequest,
    FieldViolation,
    LocalFault,
    PdserveError,
    Reason,
    Refused,
    TransferFailed,
    WorkerLost,
)

DETAILS_KEY = "grpc-status-details-bin"
BAD_REQUESTS = frozenset(
    {Reason.INVALID_FIELD, Reason.CONTEXT_TOO_LONG, Reason.MODEL_NOT_FOUND, Reason.DUPLICATE_ID}
)
REFUSALS = frozenset({Reason.OVERLOADED, Reason.QUEUE_TIMEOUT, Reason.NO_WORKERS, Reason.DRAINING})
FAILED_TRANSFERS = frozenset({Reason.TRANSFER_FAILED, Reason.KV_INTEGRITY})


def error_from_call(error: grpc.aio.AioRpcError, address: str) -> PdserveError:
    """The error that `error` carries in google.rpc details, else what its status code says."""
    status = _status_details(error)
    if status is None:
        return _error_from_code(error, address)
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    for detail in status.details:
        for part in (info, retry, bad):
            if detail.Is(part.DESCRIPTOR):
                detail.Unpack(part)
    if info.domain != ERROR_DOMAIN:
        return _error_from_code(error, address)
    return _error_of(
        _reason_of(info.reason),
        status.message,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds(),
        violations=tuple(
            FieldViolation(violation.field, violation.description)
            for violation in bad.field_violations
        ),
    )


def _status_details(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    trailers = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailers:
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(
                    value if isinstance(value, bytes) else value.encode("latin-1")
                )
            except DecodeError:
                return None
    return None


def _reason_of(name: str) -> Reason:
    return Reason(name) if name in Reason.__members__ else Reason.INTERNAL


def _error_of(
    reason: Reason,
    message: str,
    *,
    retry_after_s: float = 0.0,
    violations: tuple[FieldViolation, ...] = (),
) -> PdserveError:
    if reason in BAD_REQUESTS:
        return BadRequest(message, reason=reason, violations=violations)
    if reason in REFUSALS:
        return Refused(message, reason=reason, retry_after_s=retry_after_s)
    if reason is Reason.WORKER_LOST:
        return WorkerLost(message, retry_after_s=retry_after_s)
    if reason in FAILED_TRANSFERS:
        return TransferFailed(message, reason=reason, retry_after_s=retry_after_s)
    return PdserveError(message, reason=reason, retry_after_s=retry_after_s)


def _error_from_code(error: grpc.aio.AioRpcError, address: str) -> PdserveError:
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return ClusterUnreachable(f"{address}: {_connection_problem(error.details() or '')}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return PdserveError("the deadline of the request passed", reason=Reason.DEADLINE)
        case grpc.StatusCode.CANCELLED:
            return PdserveError("the request was cancelled", reason=Reason.CANCELLED)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return BadRequest("the request is larger than the server takes in one message")
        case grpc.StatusCode.UNIMPLEMENTED:
            return LocalFault(
                f"{address}: the server there lacks this service; requests go to the router's "
                "public port, `pdserve status` to its internal one"
            )
        case code:
            return PdserveError(f"{address}: the call failed with status {code.name}")


def _connection_problem(details: str) -> str:
    """What the local gRPC library saw, in our words."""
    lowered = details.lower()
    if "refused" in lowered or "no such file" in lowered:
        return "connection refused"
    if "dns" in lowered or "name resolution" in lowered or "resolve" in lowered:
        return "no such host"
    if "timeout" in lowered or "timed out" in lowered or "ping" in lowered:
        return "no answer"
    return "the connection broke"
