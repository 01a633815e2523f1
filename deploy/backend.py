"""What `pdserve up` asks of a place that clusters run in."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deploy.deployment import Deployment
from deploy.log_dir import LogDir
from deploy.registration import all_alive
from pdserve.cli.problems import ClusterFailed
from pdserve.domain.errors import PdserveError

Report = Callable[[str], None]
"""Hears of each step of a start, for people."""
KILL_GRACE_S = 5.0
"""A process that takes this much longer to drain than its own limit is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRow:
    """One process as `up` shows it."""

    name: str
    role: str
    pid: int
    address: str  # of its internal service; empty: it does not serve yet
    num_blocks: int  # KV blocks; 0 for a router, and where a GPU decides
    metrics_address: str = ""  # Prometheus; empty: none
    place: str = ""  # the node it runs on; empty: this machine
    num_ranks: int = 1
    device: str = ""  # what its ranks compute on: cores 0,1 or GPUs 0,1; empty: nothing special


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something happened to a running cluster."""

    message: str
    asks_stop: bool = False  # somebody elsewhere wants it drained and stopped


class Cluster(ABC):
    """A cluster owned by an `async with` block.

    Entering starts it whole or raises `LocalFault` or `ClusterFailed` with nothing left running.
    Leaving drains it, or kills it where an exception leaves; nothing is left either way.
    """

    def __init__(self, deployment: Deployment, report: Report) -> None:
        self.deployment = deployment
        self.public_address = ""
        self.internal_address = ""
        self._report = report
        self._logs: LogDir | None = None
        self._events: asyncio.Queue[ClusterEvent] = asyncio.Queue()

    @property
    @abstractmethod
    def rows(self) -> Sequence[ProcessRow]:
        """The router first, then its workers."""

    @property
    def num_serving(self) -> int:
        """Processes that serve already, while it starts."""
        return sum(bool(row.address) for row in self.rows)

    @property
    def log_dir(self) -> Path:
        """A path of no meaning before the start."""
        return self._logs.path if self._logs is not None else Path()

    async def next_event(self) -> ClusterEvent:
        """The next thing that happened, told once; a loss is never the end: it is replaced."""
        return await self._events.get()

    @abstractmethod
    async def drain(self) -> None:
        """Let requests finish: first the router, then the workers."""

    @abstractmethod
    def kill(self) -> None:
        """End every process at once; leaving the block still waits for their ends."""

    async def __aenter__(self) -> Self:
        self._check()
        try:
            async with asyncio.timeout(self.deployment.start_s):
                await self._start_all()
        except TimeoutError:
            message = self._late_message()
            await self._end_all(keeps_logs=True)
            raise ClusterFailed(message) from None
        except BaseException:
            await self._end_all(keeps_logs=True)
            raise
        return self

    async def __aexit__(self, kind: object, error: object, /, *_: object) -> None:
        try:
            if error is None:
                await self.drain()
        finally:
            await self._end_all(keeps_logs=error is not None)

    @abstractmethod
    def _check(self) -> None:
        """Raise `LocalFault` for what can be known beforehand."""

    @abstractmethod
    async def _start_all(self) -> None: ...

    @abstractmethod
    async def _end_all_now(self, keeps_logs: bool) -> None:
        """Kill what is left, and wait until it is gone."""

    async def _end_all(self, *, keeps_logs: bool) -> None:
        # A second Ctrl-C must leave nothing behind: all is killed at once, this is brief.
        await asyncio.shield(self._end_all_now(keeps_logs))
        if self._logs is not None and not keeps_logs:
            self._logs.remove()

    async def _wait_for_registration(self, ends: Iterable[Coroutine[Any, Any, str]]) -> None:
        """Until the router has all workers; what one of `ends` says before is a `ClusterFailed`."""
        self._report("waiting for the router to see all workers")
        names = {row.name for row in self.rows[1:]}
        seen = asyncio.create_task(all_alive(self.internal_address, names))
        losses = [asyncio.create_task(end) for end in ends]
        try:
            await asyncio.wait({seen, *losses}, return_when=asyncio.FIRST_COMPLETED)
            for loss in losses:
                if loss.done():
                    raise ClusterFailed(loss.result())
            await seen
        finally:
            for task in (seen, *losses):
                task.cancel()
            await asyncio.gather(seen, *losses, return_exceptions=True)

    def _tell(self, message: str, *, asks_stop: bool = False) -> None:
        self._events.put_nowait(ClusterEvent(message, asks_stop))

    def _late_message(self) -> str:
        limit = f"{self.deployment.start_s:g} s (start_s)"
        late = ", ".join(row.name for row in self.rows if not row.address)
        if not late:
            return f"the router did not see all workers within {limit}; logs in {self.log_dir}"
        return f"{late} did not serve within {limit}; logs in {self.log_dir}"


async def side_by_side(work: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """All of it at once; the first error ends the rest and is raised, one of ours first."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for each in work:
                tasks.create_task(each)
    except ExceptionGroup as group:
        errors = [error for error in group.exceptions if isinstance(error, PdserveError)]
        raise (errors or group.exceptions)[0] from None
