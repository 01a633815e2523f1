"""The error that only a client can see, and the names under which failures are counted."""

from pdserve.domain.errors import PdserveError, PeerFault


class ClusterUnreachable(PeerFault):
    """No pdserve answers at the address, or the connection broke. The reason is ours, not sent."""


def failure_name(error: PdserveError) -> str:
    """How reports count this error."""
    return "UNREACHABLE" if isinstance(error, ClusterUnreachable) else error.reason.value
