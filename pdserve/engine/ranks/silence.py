"""How long a peer has said nothing, as far as a process can tell that has pauses of its own."""

from pathlib import Path

TICK_S = 0.1
"""How often a process looks; also the beat of its own clock."""

MIN_LOOKS = 3


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


class Standstill:
    """Whether a process of this host is stopped (SIGSTOP), which no busy machine looks like.

    It counts if it was seen at several ticks in a row: all processes of a worker that is paused are
    let go on one after the other.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._num_looks = 0
        self._since_s = 0.0

    def look(self, now_s: float) -> float:
        """For how long it has been seen so; 0 if it was not seen so often enough."""
        if not is_stopped(self._pid):
            self._num_looks = 0
            return 0.0
        if self._num_looks == 0:
            self._since_s = now_s
        self._num_looks += 1
        return now_s - self._since_s if self._num_looks >= MIN_LOOKS else 0.0


def is_stopped(pid: int) -> bool:
    """The process waits for SIGCONT; False too if it is gone. See proc(5)."""
    try:
        said = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return said.rpartition(b")")[2].split()[0] == b"T"
