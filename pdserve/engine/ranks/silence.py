"""How long a peer has said nothing, as far as a process can tell that has pauses of its own."""

TICK_S = 0.1
"""How often a process looks; also the beat of its own clock."""


class Silence:
    """Counts only while this process runs: a late tick counts as two ticks at most.

    A machine that was suspended, or is so busy that nobody gets his turn, thus silences no one.
    """

    def __init__(self, now_s: float) -> None:
        self.silent_s = 0.0
        self._ticked_s = now_s

    def heard(self) -> None:
        self.silent_s = 0.0

    def tick(self, now_s: float) -> float:
        """Call every `TICK_S`; how long the peer has been silent."""
        self.silent_s += min(now_s - self._ticked_s, 2 * TICK_S)
        self._ticked_s = now_s
        return self.silent_s
