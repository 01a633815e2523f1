"""The table of requests that have been taken and not ended, and the counts of those that have."""

from collections import Counter
from enum import StrEnum

from pdserve.domain.errors import BadRequest, Reason, Refused

DRAINING_RETRY_AFTER_S = 0.1
MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 30.0
FIRST_GUESS_S = 1.0
SMOOTHING = 0.1
"""Weight of the newest request in the mean time that requests take."""


class Outcome(StrEnum):
    """How a request ended, as operators count it."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"


class InFlight:
    """One entry for each request, by the client's name for it; bounded."""

    def __init__(self, *, max_num_requests: int) -> None:
        self.counts: Counter[Outcome] = Counter()
        self.is_draining = False
        self._max_num_requests = max_num_requests
        self._entered_s: dict[str, float] = {}
        self._mean_total_s = FIRST_GUESS_S

    def __len__(self) -> int:
        return len(self._entered_s)

    def enter(self, label: str, now_s: float) -> None:
        """Add a request; raises `Refused` or `BadRequest` and adds nothing."""
        try:
            self._check(label)
        except (Refused, BadRequest):
            self.counts[Outcome.REFUSED] += 1
            raise
        self._entered_s[label] = now_s

    def leave(self, label: str, outcome: Outcome, now_s: float) -> None:
        """End a request that has entered."""
        total_s = now_s - self._entered_s.pop(label)
        self.counts[outcome] += 1
        if outcome is Outcome.COMPLETED:
            self._mean_total_s += SMOOTHING * (total_s - self._mean_total_s)

    def retry_after_s(self) -> float:
        """Expected time until a place is free: n requests of T seconds each end every T / n."""
        place_s = self._mean_total_s / max(len(self), 1)
        return min(max(place_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    def _check(self, label: str) -> None:
        if self.is_draining:
            raise Refused(
                "this router is shutting down",
                reason=Reason.DRAINING,
                retry_after_s=DRAINING_RETRY_AFTER_S,
            )
        if label in self._entered_s:
            raise BadRequest(
                "a request with this request_id is in flight", reason=Reason.DUPLICATE_ID
            )
        if len(self) >= self._max_num_requests:
            raise Refused(
                f"{len(self)} requests are in flight; the limit is {self._max_num_requests}",
                retry_after_s=self.retry_after_s(),
            )
