"""From an error to what a person should do about it."""

from pdserve.client.faults import ClusterUnreachable
from pdserve.domain.errors import BadRequest, LocalFault, PdserveError, Reason

EXIT_FAILED = 1
EXIT_USAGE = 2

ADVICE: dict[Reason, str] = {
    Reason.MODEL_NOT_FOUND: "`pdserve models` lists what is served",
    Reason.OVERLOADED: "the cluster is full; try later, or add workers",
    Reason.QUEUE_TIMEOUT: "the cluster is full; try later, or add workers",
    Reason.NO_WORKERS: "`pdserve status` shows the workers; restart the cluster if one is missing",
    Reason.WORKER_LOST: "`pdserve status` shows the workers; trying again is safe",
    Reason.STREAM_INTERRUPTED: "`pdserve status` shows the workers; ask again from the start",
    Reason.DRAINING: "the cluster is shutting down",
    Reason.DEADLINE: "raise --timeout, or ask for fewer tokens",
    Reason.KV_INTEGRITY: "see the workers' logs; trying again is safe",
    Reason.UNUSABLE_LOGITS: "the model's numbers overflow; try another dtype, or other weights",
    Reason.INTERNAL: "the logs of the router and the workers say more",
}


class ClusterFailed(PdserveError):
    """A process of a cluster did not start, or took the cluster with it; the message says all."""


def explain(error: PdserveError) -> str:
    """One line: what happened, then what to do."""
    advice = _advice(error)
    return f"{error.message}; {advice}" if advice else error.message


def exit_code(error: PdserveError) -> int:
    """2 for what the person asked wrongly, 1 for what went wrong then."""
    return EXIT_USAGE if isinstance(error, BadRequest | LocalFault) else EXIT_FAILED


def _advice(error: PdserveError) -> str:
    if isinstance(error, ClusterUnreachable):
        return (
            "is the cluster up? `pdserve up` starts one; --address or --internal-address names "
            "another"
        )
    if isinstance(error, LocalFault | ClusterFailed):
        return ""
    advice = ADVICE.get(error.reason, "")
    if error.retry_after_s > 0:
        advice = f"retry after {error.retry_after_s:.1f} s; {advice}".removesuffix("; ")
    return advice
