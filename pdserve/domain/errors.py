"""The one tree of errors and the one table that turns them into replies.

Refusal by policy travels as a value inside a process; these are the exceptions at its edges.
Messages name a limit and the value seen, never a prompt and never a library's exception text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

ERROR_DOMAIN = "pdserve"


class Reason(StrEnum):
    """What went wrong, as clients and peers see it."""

    INVALID_FIELD = "INVALID_FIELD"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    OVERLOADED = "OVERLOADED"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    DEADLINE = "DEADLINE"
    CANCELLED = "CANCELLED"
    NO_WORKERS = "NO_WORKERS"
    WORKER_LOST = "WORKER_LOST"
    STREAM_INTERRUPTED = "STREAM_INTERRUPTED"
    DRAINING = "DRAINING"
    KV_INTEGRITY = "KV_INTEGRITY"
    TRANSFER_FAILED = "TRANSFER_FAILED"
    INCOMPATIBLE_PEER = "INCOMPATIBLE_PEER"
    FENCED = "FENCED"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    DUPLICATE_ID = "DUPLICATE_ID"
    UNUSABLE_LOGITS = "UNUSABLE_LOGITS"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Reply:
    """How one reason is answered: gRPC status name, HTTP code, whether trying again can help."""

    grpc: str
    http: int
    is_retryable: bool = False


REPLIES: dict[Reason, Reply] = {
    Reason.INVALID_FIELD: Reply("INVALID_ARGUMENT", 400),
    Reason.CONTEXT_TOO_LONG: Reply("INVALID_ARGUMENT", 400),
    Reason.MODEL_NOT_FOUND: Reply("NOT_FOUND", 404),
    Reason.OVERLOADED: Reply("RESOURCE_EXHAUSTED", 429, is_retryable=True),
    Reason.QUEUE_TIMEOUT: Reply("RESOURCE_EXHAUSTED", 429, is_retryable=True),
    Reason.DEADLINE: Reply("DEADLINE_EXCEEDED", 504),
    Reason.CANCELLED: Reply("CANCELLED", 499),
    Reason.NO_WORKERS: Reply("UNAVAILABLE", 503, is_retryable=True),
    Reason.WORKER_LOST: Reply("UNAVAILABLE", 503, is_retryable=True),
    Reason.STREAM_INTERRUPTED: Reply("UNAVAILABLE", 503),
    Reason.DRAINING: Reply("UNAVAILABLE", 503, is_retryable=True),
    Reason.KV_INTEGRITY: Reply("DATA_LOSS", 500),
    Reason.TRANSFER_FAILED: Reply("UNAVAILABLE", 503, is_retryable=True),
    Reason.INCOMPATIBLE_PEER: Reply("FAILED_PRECONDITION", 500),
    Reason.FENCED: Reply("ABORTED", 500),
    Reason.SLOW_CONSUMER: Reply("RESOURCE_EXHAUSTED", 429),
    Reason.DUPLICATE_ID: Reply("ALREADY_EXISTS", 409),
    Reason.UNUSABLE_LOGITS: Reply("INTERNAL", 500),
    Reason.INTERNAL: Reply("INTERNAL", 500),
}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    field: str
    description: str


class PdserveError(Exception):
    """Base of all errors that have a reply. `message` is safe to show to a client."""

    default_reason = Reason.INTERNAL

    def __init__(
        self, message: str, *, reason: Reason | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_after_s = retry_after_s

    @property
    def reply(self) -> Reply:
        return REPLIES[self.reason]


class BadRequest(PdserveError):
    """The client's mistake; nothing was started."""

    default_reason = Reason.INVALID_FIELD

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message, reason=reason)
        self.violations = violations

    @classmethod
    def of(cls, violations: Iterable[FieldViolation], reason: Reason | None = None) -> Self:
        listed = tuple(violations)
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in listed)
        return cls(text, reason=reason, violations=listed)


class Refused(PdserveError):
    """Not taken on; the client may come back after `retry_after_s`."""

    default_reason = Reason.OVERLOADED


class PeerFault(PdserveError):
    """A peer failed; the owner of the request may try elsewhere."""

    default_reason = Reason.WORKER_LOST


class WorkerLost(PeerFault):
    """The worker died, went silent or closed its stream."""


class TransferFailed(PeerFault):
    """KV did not arrive, or did not match its digest (reason KV_INTEGRITY)."""

    default_reason = Reason.TRANSFER_FAILED


class ReadRefused(TransferFailed):
    """The peer lives and does not let these blocks be read: no other transport helps."""


class RankLost(PdserveError):
    """A rank of this worker died, stopped or failed: the worker cannot go on."""


class LocalFault(PdserveError):
    """Ours: a setting, a file or a bug."""
