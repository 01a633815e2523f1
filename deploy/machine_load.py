"""Who keeps this machine busy: ours, or others."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
FIRST_BUSY, IDLE, IOWAIT, LAST = 0, 3, 4, 7  # fields of the first line of /proc/stat, see proc(5)


class LoadMeter:
    """Cores that other programs used since the meter was made, on average.

    `pids` are ours, this process aside; those that ended in between count as foreign from then on.
    """

    def __init__(self, pids: Iterable[int], *, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._pids = (os.getpid(), *pids)
        self._begun = self._read()

    def foreign_cores(self) -> float | None:
        """None where the system does not tell."""
        now = self._read()
        if now is None or self._begun is None:
            return None
        spent_s, busy_s, own_s = (
            after - before for after, before in zip(now, self._begun, strict=True)
        )
        return max(0.0, busy_s - own_s) / spent_s if spent_s > 0 else None

    def _read(self) -> tuple[float, float, float] | None:
        """Clock, and CPU seconds of the machine and of our processes."""
        try:
            line = (self._proc / "stat").read_text().split("\n", 1)[0]
            ticks = [int(field) for field in line.split()[1:]]
        except (OSError, ValueError):
            return None
        busy = sum(ticks[FIRST_BUSY : LAST + 1]) - ticks[IDLE] - ticks[IOWAIT]
        own = sum(_ticks_of(self._proc, pid) for pid in self._pids)
        return time.monotonic(), busy / TICKS_PER_S, own / TICKS_PER_S


def families(pids: Iterable[int], *, proc: Path = Path("/proc")) -> tuple[int, ...]:
    """These processes and all that began in them, such as the ranks of a worker."""
    found: list[int] = []
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            waiting += map(int, (proc / f"{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
    return tuple(found)


def cpu_s(pids: Mapping[str, int], *, proc: Path = Path("/proc")) -> dict[str, float]:
    """CPU seconds that each process has used; 0 for one that has ended."""
    return {name: _ticks_of(proc, pid) / TICKS_PER_S for name, pid in pids.items()}


def _ticks_of(proc: Path, pid: int) -> int:
    try:
        stat = (proc / str(pid) / "stat").read_text()
    except OSError:
        return 0
    # The name, in parentheses, may hold anything; user and system time are fields 14 and 15.
    fields = stat.rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
