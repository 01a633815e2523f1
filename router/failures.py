"""Failures of workers: who is left out of the next attempt, and what the client is told."""

from pdserve.domain.errors import (
    BadRequest,
    LocalFault,
    PdserveError,
    PeerFault,
    Reason,
    Refused,
    WorkerLost,
)
from pdserve.domain.tokens import Failed
from router.cluster_view import Life
from router.in_flight import Outcome
from router.policy import Pair

RETRY_AFTER_S = 1.0
DRAINING_RETRY_AFTER_S = 0.1

MOVED = frozenset(
    {
        Reason.WORKER_LOST,
        Reason.TRANSFER_FAILED,
        Reason.NO_WORKERS,
        Reason.DRAINING,
        Reason.INCOMPATIBLE_PEER,
        Reason.FENCED,
        Reason.CANCELLED,  # by the worker: the router takes no output of what it has cancelled
    }
)
"""Failures of workers: another pair may do better.

KV_INTEGRITY is not among them: the decode worker has read the blocks twice from every prefill
worker it was given, so a person must look. Nor is UNUSABLE_LOGITS: every worker runs the same model
on the same tokens.
"""
OF_DECODE = frozenset({Reason.DRAINING, Reason.FENCED, Reason.CANCELLED})
"""Among those, the ones that a decode worker reports of itself; the others are of its peers."""
SHOWN_BY_NAME = frozenset({Reason.TRANSFER_FAILED, Reason.WORKER_LOST})
"""Failures of workers that clients see by name; the others are internal."""


def outcome_of(error: PdserveError) -> Outcome:
    """How a request that ended with `error` is counted."""
    if error.reason is Reason.CANCELLED:
        return Outcome.CANCELLED
    return Outcome.REFUSED if isinstance(error, BadRequest | Refused) else Outcome.FAILED


def blamed_lives(fault: PeerFault, pair: Pair) -> set[Life]:
    """Whom to leave out of the next attempt."""
    of_decode = isinstance(fault, WorkerLost) or fault.reason in OF_DECODE
    if of_decode or not pair.prefill_targets:
        return {pair.decode.life}
    return {target.life for target in pair.prefill_targets}


def error_of(failed: Failed) -> PdserveError:
    """A worker's failure as our own; the messages of workers are written by `pdserve` too."""
    if failed.reason in MOVED:
        return PeerFault(failed.message, reason=failed.reason)
    match failed.reason:
        case Reason.INVALID_FIELD | Reason.CONTEXT_TOO_LONG:
            return BadRequest(failed.message, reason=failed.reason)
        case Reason.OVERLOADED | Reason.QUEUE_TIMEOUT:
            return Refused(failed.message, reason=failed.reason, retry_after_s=failed.retry_after_s)
        case Reason.DEADLINE | Reason.SLOW_CONSUMER | Reason.KV_INTEGRITY | Reason.UNUSABLE_LOGITS:
            return PdserveError(failed.message, reason=failed.reason)
        case _:
            return LocalFault("internal error at a worker")


def shown_to_client(fault: PeerFault) -> PdserveError:
    """How the last fault looks to the client once attempts, or workers, are used up."""
    reason = fault.reason if fault.reason in SHOWN_BY_NAME else Reason.WORKER_LOST
    return PeerFault(fault.message, reason=reason, retry_after_s=RETRY_AFTER_S)


def no_workers() -> Refused:
    return Refused(
        "no healthy decode worker is registered",
        reason=Reason.NO_WORKERS,
        retry_after_s=RETRY_AFTER_S,
    )


def interrupted(num_delivered: int) -> PdserveError:
    """A worker was lost when the client had a part of the answer."""
    return PdserveError(
        f"a worker was lost after {num_delivered} tokens", reason=Reason.STREAM_INTERRUPTED
    )


def interrupted_by_drain(num_delivered: int) -> PdserveError:
    """The router's time to drain is over."""
    if num_delivered:
        message = f"the router shut down after {num_delivered} tokens"
        return PdserveError(message, reason=Reason.STREAM_INTERRUPTED)
    return PdserveError(
        "this router is shutting down",
        reason=Reason.DRAINING,
        retry_after_s=DRAINING_RETRY_AFTER_S,
    )


def slow_consumer(max_num_tokens: int) -> PdserveError:
    """The client does not read as fast as tokens come."""
    return PdserveError(
        f"more than {max_num_tokens} tokens were waiting to be read", reason=Reason.SLOW_CONSUMER
    )
