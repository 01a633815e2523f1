"""How long a peer has said nothing, as far as a process can tell that has pauses of its own."""

from pathlib import Path

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


def is_stopped(pid: int) -> bool:
    """The process waits for SIGCONT; False too if it is gone. See proc(5)."""
    try:
        said = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return said.rpartition(b")")[2].split()[0] == b"T"
