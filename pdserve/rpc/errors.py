"""Errors to gRPC status and back, by the table in `pdserve.domain.errors`."""

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pdserve.domain.errors import ERROR_DOMAIN, BadRequest, PdserveError


def to_status(error: PdserveError, metadata: dict[str, str] | None = None) -> status_pb2.Status:
    """Status with ErrorInfo, field violations of a bad request and RetryInfo where it helps."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.reply.grpc), message=error.message)
    details: list[
        error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo
    ] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata or {}
        )
    ]
    if isinstance(error, BadRequest) and error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=violation.field, description=violation.description
            )
            for violation in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.reply.is_retryable:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(
    context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    error: PdserveError,
    metadata: dict[str, str] | None = None,
) -> None:
    """End a call with `error`; always raises. -1 as pushback tells gRPC clients not to retry."""
    status = rpc_status.to_status(to_status(error, metadata))
    pushback_ms = int(error.retry_after_s * 1000) if error.reply.is_retryable else -1
    await context.abort(
        status.code,
        status.details,
        (*status.trailing_metadata, ("grpc-retry-pushback-ms", str(pushback_ms))),
    )
