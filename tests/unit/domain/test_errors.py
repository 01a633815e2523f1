"""The table of errors is whole, and says what clients may rely on."""

import grpc
import pytest
from google.rpc import error_details_pb2

from pdserve.domain.errors import (
    REPLIES,
    BadRequest,
    FieldViolation,
    LocalFault,
    PdserveError,
    Reason,
    Refused,
    TransferFailed,
    WorkerLost,
)
from pdserve.rpc.errors import to_status


def test_every_reason_has_a_reply_with_a_real_status() -> None:
    assert set(REPLIES) == set(Reason)
    names = {code.name for code in grpc.StatusCode}
    assert {reply.grpc for reply in REPLIES.values()} <= names
    assert all(400 <= reply.http <= 599 for reply in REPLIES.values())


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (BadRequest("x"), Reason.INVALID_FIELD, "INVALID_ARGUMENT"),
        (Refused("x"), Reason.OVERLOADED, "RESOURCE_EXHAUSTED"),
        (Refused("x", reason=Reason.NO_WORKERS), Reason.NO_WORKERS, "UNAVAILABLE"),
        (WorkerLost("x"), Reason.WORKER_LOST, "UNAVAILABLE"),
        (TransferFailed("x", reason=Reason.KV_INTEGRITY), Reason.KV_INTEGRITY, "DATA_LOSS"),
        (LocalFault("x"), Reason.INTERNAL, "INTERNAL"),
    ],
)
def test_errors_carry_their_reason(error: PdserveError, reason: Reason, status: str) -> None:
    assert (error.reason, error.reply.grpc) == (reason, status)


def test_bad_request_lists_each_field() -> None:
    violations = [FieldViolation("a", "must be 1; got 2"), FieldViolation("b", "must be 3; got 4")]
    status = to_status(BadRequest.of(violations))
    assert status.message == "a: must be 1; got 2; b: must be 3; got 4"
    details = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(details)
    assert [violation.field for violation in details.field_violations] == ["a", "b"]


def test_only_retryable_errors_carry_retry_advice() -> None:
    refused = to_status(Refused("full", retry_after_s=1.5))
    retry = error_details_pb2.RetryInfo()
    assert refused.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert len(to_status(LocalFault("bug")).details) == 1
