"""Requests/s that a router takes in the long run, and how many of them may come at once."""

MAX_TOLERANCE = 1e-9


class RateLimit:
    """A bucket of `burst` requests that fills at `rate` requests/s. Time is handed in."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self._burst = burst
        self._missing = 0.0  # of a full bucket
        self._at_s: float | None = None

    def wait_s(self, now_s: float) -> float:
        """Until the next request may be taken; 0 if it may be taken at once."""
        lacking = self._missing_at(now_s) - (self._burst - 1)
        return lacking / self.rate if lacking > MAX_TOLERANCE * self._burst else 0.0

    def take(self, now_s: float) -> None:
        """Count a request that was taken."""
        self._missing = self._missing_at(now_s) + 1.0
        self._at_s = now_s

    def _missing_at(self, now_s: float) -> float:
        past_s = now_s - self._at_s if self._at_s is not None else 0.0
        return max(0.0, self._missing - past_s * self.rate)
