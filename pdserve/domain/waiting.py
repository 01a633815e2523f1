"""Who waits in a worker, and whose turn it is: one queue for any discipline.

fcfs       who came first
deadline   who leaves first, served or not: by its deadline, or after the longest wait if that
           ends sooner; so one with a far deadline rises as it waits, and none starves
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping
from operator import itemgetter
from typing import Generic, Literal, Protocol, TypeVar

QueueOrder = Literal["fcfs", "deadline"]


class Waiter(Protocol):
    @property
    def leave_by_s(self) -> float:
        """When it gives up waiting, on the worker's clock."""
        ...

    @property
    def num_tokens(self) -> int:
        """Of its prompt."""
        ...


class Discipline(Protocol):
    """Whoever has the least key is next; of equals the one that came first."""

    def __call__(self, waiter: Waiter, /) -> float: ...


DISCIPLINES: Mapping[QueueOrder, Discipline] = {
    "fcfs": lambda _: 0.0,
    "deadline": lambda waiter: waiter.leave_by_s,
}

K = TypeVar("K", bound=Hashable)
W = TypeVar("W", bound=Waiter)


class WaitingQueue(Generic[K, W]):
    """Bounded, in the order of a discipline."""

    def __init__(self, discipline: Discipline, max_num_queued: int) -> None:
        self._discipline = discipline
        self._max_num_queued = max_num_queued
        self._entries: list[tuple[tuple[float, int], W]] = []  # sorted; no two places are equal
        self._places: dict[K, tuple[float, int]] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[W]:
        return (waiter for _, waiter in self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._places

    @property
    def num_tokens(self) -> int:
        return sum(waiter.num_tokens for waiter in self)

    def push(self, key: K, waiter: W) -> bool:
        """Queue one; False when the queue is full."""
        if len(self) >= self._max_num_queued:
            return False
        self._num_pushed += 1
        place = self._places[key] = (self._discipline(waiter), self._num_pushed)
        insort(self._entries, (place, waiter))
        return True

    def peek(self) -> W | None:
        """Who is next, left in its place."""
        return self._entries[0][1] if self._entries else None

    def remove(self, key: K) -> W | None:
        """Take out one, wherever it stands; None if it does not wait here."""
        place = self._places.pop(key, None)
        if place is None:
            return None
        return self._entries.pop(bisect_left(self._entries, place, key=itemgetter(0)))[1]
