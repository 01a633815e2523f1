"""Ranks as forks of one process of their host: their birth, their end, and how they ended."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
REAP_S = 1.0
"""A process that was killed is gone within this time."""
HASTY_REAP_S = 0.25
"""The same for a worker that dies: its own end must not wait for long."""


@dataclass(frozen=True, slots=True)
class LocalRank:
    rank: int
    pid: int
    pidfd: int
    connection: socket.socket


class LocalRanks:
    """Owns the rank processes that this process forked. The kernel kills them when it dies."""

    def __init__(self, ranks: Sequence[LocalRank]) -> None:
        self.ranks = ranks
        self._ends: dict[int, str] = {}

    def how_it_ended(self, rank: int, within_s: float) -> str | None:
        """`was killed by signal 9`, `exited with code 1`; None if it still runs, or is not ours.

        Blocks for `within_s` at most: for a worker that is about to end.
        """
        for each in self.ranks:
            if each.rank == rank:
                return self._end_of(each, within_s)
        return None

    def kill(self) -> None:
        """End them all, without waiting for it; safe to call twice."""
        for each in self.ranks:
            if each.rank not in self._ends:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(each.pidfd, signal.SIGKILL)

    def reap(self, within_s: float) -> None:
        """Wait until they are gone. What is not in time falls to the init process of the system."""
        until_s = time.monotonic() + within_s
        for each in self.ranks:
            self._end_of(each, max(0.0, until_s - time.monotonic()))

    def _end_of(self, each: LocalRank, within_s: float) -> str | None:
        if each.rank not in self._ends:
            waiting = select.poll()
            waiting.register(each.pidfd, select.POLLIN)
            if not waiting.poll(within_s * 1000):
                return None
            _, status = os.waitpid(each.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self._ends[each.rank] = (
                f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            )
        return self._ends[each.rank]


def fork_ranks(ranks: Iterable[int], run: Callable[[int, socket.socket], None]) -> LocalRanks:
    """Fork a process for each rank, which calls `run` with its end of a socket and then ends.

    Only for processes without threads and event loop: a child has neither.
    """
    forked: list[LocalRank] = []
    for rank in ranks:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become(rank, parent, theirs, run)
        theirs.close()
        forked.append(LocalRank(rank, pid, os.pidfd_open(pid), ours))
    return LocalRanks(forked)


def call_itself(name: str) -> None:
    """What ps and top show, of at most 15 bytes; the command line stays that of the parent."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def close_all_but(*kept: int) -> None:
    """What else was inherited must end with its own holders, other children's pipes among them."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def _become(
    rank: int, parent: int, connection: socket.socket, run: Callable[[int, socket.socket], None]
) -> NoReturn:
    """Be the rank; never returns to the code of the parent."""
    code = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it died before we asked
        call_itself(f"pdserve-rank{rank}")
        # They end with rank 0, which ends in order when it is asked to.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1):  # what the parent says on its output is for whoever started it
            os.dup2(nothing, standard)
        close_all_but(0, 1, 2, connection.fileno())
        run(rank, connection)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  the parent's code must not run here
        with contextlib.suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
    os._exit(code)
