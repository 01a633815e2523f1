from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from pdserve.client.errors import DETAILS_KEY, error_from_call
from pdserve.client.faults import ClusterUnreachable, failure_name
from pdserve.domain.errors import (
    BadRequest,
    FieldViolation,
    LocalFault,
    PdserveError,
    Reason,
    Refused,
    TransferFailed,
    WorkerLost,
)

ADDRESS = "127.0.0.1:7450"


def failed_call(
    code: grpc.StatusCode, *details: Any, message: str = "said", domain: str = "pdserve"
) -> grpc.aio.AioRpcError:
    packed = []
    for detail in details:
        if isinstance(detail, Reason):
            detail = error_details_pb2.ErrorInfo(reason=detail.value, domain=domain)
        wrapped = AnyMessage()
        wrapped.Pack(detail)
        packed.append(wrapped)
    status = status_pb2.Status(message=message, details=packed)
    trailers = ((DETAILS_KEY, status.SerializeToString()),) if packed else ()
    return rpc_error(code, trailers, message)


def rpc_error(code: grpc.StatusCode, trailers: Any, message: str = "") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*trailers),
        details=message,
        debug_error_string=None,
    )


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_comes_back_as_it_was_sent(reason: Reason) -> None:
    error = error_from_call(failed_call(grpc.StatusCode.INTERNAL, reason), ADDRESS)
    assert error.reason is reason
    assert error.message == "said"
    assert failure_name(error) == reason.value


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.INVALID_FIELD, BadRequest),
        (Reason.MODEL_NOT_FOUND, BadRequest),
        (Reason.OVERLOADED, Refused),
        (Reason.DRAINING, Refused),
        (Reason.WORKER_LOST, WorkerLost),
        (Reason.KV_INTEGRITY, TransferFailed),
        (Reason.DEADLINE, PdserveError),
    ],
)
def test_reason_chooses_the_class(reason: Reason, kind: type[PdserveError]) -> None:
    assert type(error_from_call(failed_call(grpc.StatusCode.UNKNOWN, reason), ADDRESS)) is kind


def test_retry_time_and_field_violations_are_kept() -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    refused = error_from_call(
        failed_call(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED, retry), ADDRESS
    )
    assert refused.retry_after_s == 1.5
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.top_p", description="must be above 0")
    error = error_from_call(
        failed_call(grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD, bad), ADDRESS
    )
    assert isinstance(error, BadRequest)
    assert error.violations == (FieldViolation("sampling.top_p", "must be above 0"),)


def test_reason_of_a_later_release_is_an_internal_error_with_its_message() -> None:
    info = error_details_pb2.ErrorInfo(reason="TENANT_QUOTA", domain="pdserve")
    error = error_from_call(failed_call(grpc.StatusCode.RESOURCE_EXHAUSTED, info), ADDRESS)
    assert error.reason is Reason.INTERNAL
    assert error.message == "said"


@pytest.mark.parametrize(
    ("details", "problem"),
    [
        ("ipv4:127.0.0.1:7450: Failed to connect: connection refused", "connection refused"),
        ("DNS resolution failed for nohost:1", "no such host"),
        ("keepalive watchdog timeout", "no answer"),
        ("Socket closed", "the connection broke"),
    ],
)
def test_unreachable_server_is_told_by_what_happened(details: str, problem: str) -> None:
    error = error_from_call(rpc_error(grpc.StatusCode.UNAVAILABLE, (), details), ADDRESS)
    assert isinstance(error, ClusterUnreachable)
    assert error.message == f"{ADDRESS}: {problem}"
    assert failure_name(error) == "UNREACHABLE"


def test_statuses_without_details_are_understood() -> None:
    def of(code: grpc.StatusCode) -> PdserveError:
        return error_from_call(rpc_error(code, (), "library text"), ADDRESS)

    assert of(grpc.StatusCode.DEADLINE_EXCEEDED).reason is Reason.DEADLINE
    assert of(grpc.StatusCode.CANCELLED).reason is Reason.CANCELLED
    assert isinstance(of(grpc.StatusCode.RESOURCE_EXHAUSTED), BadRequest)
    assert isinstance(of(grpc.StatusCode.UNIMPLEMENTED), LocalFault)
    assert of(grpc.StatusCode.UNKNOWN).reason is Reason.INTERNAL
    for code in grpc.StatusCode:
        assert "library text" not in of(code).message


def test_torn_or_foreign_details_fall_back_to_the_status_code() -> None:
    torn = rpc_error(grpc.StatusCode.UNAVAILABLE, ((DETAILS_KEY, b"\xff\xff"),), "Socket closed")
    assert isinstance(error_from_call(torn, ADDRESS), ClusterUnreachable)
    foreign = failed_call(grpc.StatusCode.UNAVAILABLE, Reason.DEADLINE, domain="elsewhere")
    assert isinstance(error_from_call(foreign, ADDRESS), ClusterUnreachable)
