"""Which clusters this user has up on this machine: a small file each, and how to stop one."""

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pdserve.cli.problems import ClusterFailed
from pdserve.domain.errors import LocalFault

GRACE_S = 15.0
"""A cluster may take this much longer to go than its drain limit."""
POLL_S = 0.05
PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A `pdserve up` that serves."""

    pid: int
    backend: str
    address: str
    internal_address: str
    drain_s: float
    born: str = ""  # when the kernel started `pid`: a later process of that number is another


@contextlib.contextmanager
def noted_run(run: Run, tell: Callable[[str], None]) -> Iterator[None]:
    """Let `pdserve down` find the run for as long as the block lasts.

    A cluster serves without: if the file cannot be written, that is told.
    """
    path: Path | None = None
    try:
        path = runs_dir() / f"{run.pid}.json"
        path.write_text(json.dumps(asdict(run) | {"born": _born(run.pid)}), encoding="utf-8")
    except (OSError, LocalFault) as error:
        why = error.message if isinstance(error, LocalFault) else f"{path}: {error.strerror}"
        tell(f"warning: `pdserve down` will not find this cluster (pid {run.pid}): {why}")
    try:
        yield
    finally:
        if path is not None:
            _forget(path)


def running() -> list[Run]:
    """All runs of this user that live, by address; files of those that were killed go."""
    found = []
    for path in runs_dir().glob("*.json"):
        run = _read(path)
        if run is not None and _is_alive(run):
            found.append(run)
        else:
            _forget(path)
    return sorted(found, key=lambda run: run.address)


def choose(runs: list[Run], address: str | None) -> list[Run]:
    """The run at `address`, or the only one; raises `LocalFault` that lists them."""
    listed = ", ".join(f"{run.address} ({run.backend}, pid {run.pid})" for run in runs)
    if not runs:
        raise ClusterFailed("no cluster of this user is up on this machine")
    if address is None:
        if len(runs) > 1:
            raise LocalFault(
                f"{len(runs)} clusters are up: {listed}; name one by --address, or --all"
            )
        return runs
    chosen = [run for run in runs if address in (run.address, run.internal_address)]
    if not chosen:
        raise LocalFault(f"no cluster is up at {address}; up: {listed}")
    return chosen


def stop(run: Run) -> float:
    """Have it drain and go; returns the seconds it took, raises `ClusterFailed` if it stays.

    Past its drain limit it is asked to stop at once.
    """
    started = time.monotonic()
    _signal(run)
    if not _wait_gone(run, run.drain_s + GRACE_S):
        _signal(run)  # a second signal ends requests too
        if not _wait_gone(run, GRACE_S):
            raise ClusterFailed(
                f"the cluster at {run.address} did not stop; its process is {run.pid}"
            )
    return time.monotonic() - started


def runs_dir() -> Path:
    """The folder of this user's run files; raises `LocalFault` where another user made it."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    name = "pdserve" if base else f"pdserve-runs-{os.getuid()}"
    folder = Path(base or tempfile.gettempdir()) / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise LocalFault(f"{folder}: {error.strerror}") from None
    if owner != os.getuid():
        raise LocalFault(
            f"{folder} belongs to another user; set XDG_RUNTIME_DIR to a folder of yours"
        )
    return folder


def _forget(path: Path) -> None:
    """A file that a read-only disk keeps is known later by the process, which is gone."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _read(path: Path) -> Run | None:
    try:
        return Run(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # torn or of another version: nobody can be stopped by it


def _is_alive(run: Run) -> bool:
    return bool(run.born) and _born(run.pid) == run.born


def _born(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty where there is none."""
    try:
        # The name in brackets may hold spaces; 20 fields follow before the start time.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _signal(run: Run) -> None:
    with contextlib.suppress(ProcessLookupError):
        if _is_alive(run):
            os.kill(run.pid, signal.SIGTERM)


def _wait_gone(run: Run, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while _is_alive(run):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
