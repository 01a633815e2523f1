"""How long to wait before a process that was lost is started again."""

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
SETTLED_S = 30.0
"""A life this long is no crash loop."""


class Backoff:
    """Pauses that double; none before the first replacement, nor after a life that lasted."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after_life(self, life_s: float) -> float:
        """Seconds to wait after a life of `life_s` seconds."""
        if life_s >= SETTLED_S:
            self._next_s = 0.0
        return self.after_failure()

    def after_failure(self) -> float:
        """Seconds to wait after an attempt that brought no life."""
        pause_s = self._next_s
        self._next_s = min(max(2 * pause_s, FIRST_BACKOFF_S), MAX_BACKOFF_S)
        return pause_s
