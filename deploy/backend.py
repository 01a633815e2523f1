"""What `pdserve up` asks of a place that clusters run in."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from pdserve.domain.errors import PdserveError

Report = Callable[[str], None]
"""Hears of each step of a start, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRow:
    """One process as `up` shows it."""

    name: str
    role: str
    pid: int
    address: str  # of its internal service; empty: it does not serve yet
    num_blocks: int  # KV blocks; 0 for a router
    metrics_address: str = ""  # Prometheus; empty: none
    place: str = ""  # the node it runs on; empty: this machine


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something happened to a running cluster."""

    message: str
    asks_stop: bool = False  # somebody elsewhere wants it drained and stopped


class Cluster(Protocol):
    """A cluster owned by an `async with` block.

    Entering starts it whole or raises `LocalFault` or `ClusterFailed` with nothing left running.
    Leaving drains it, or kills it where an exception leaves; nothing is left either way.
    """

    @property
    def public_address(self) -> str: ...

    @property
    def internal_address(self) -> str: ...

    @property
    def rows(self) -> Sequence[ProcessRow]:
        """The router first, then its workers."""
        ...

    @property
    def num_serving(self) -> int:
        """Processes that serve already, while it starts."""
        ...

    @property
    def log_dir(self) -> Path: ...

    async def next_event(self) -> ClusterEvent:
        """The next thing that happened; each is told once."""
        ...

    def kill(self) -> None:
        """End every process at once; leaving the block still waits for their ends."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: object, error: object, /, *_: object) -> None: ...


async def side_by_side(work: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """All of it at once; the first error ends the rest and is raised, one of ours first."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for each in work:
                tasks.create_task(each)
    except ExceptionGroup as group:
        errors = [error for error in group.exceptions if isinstance(error, PdserveError)]
        raise (errors or group.exceptions)[0] from None
