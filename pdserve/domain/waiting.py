"""Who waits in a worker, and whose turn it is: one queue for any discipline.

fcfs       who came first
deadline   who leaves first, served or not: by its deadline, or after the longest wait if that
           ends sooner; so one with a far deadline rises as it waits, and none starves
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import Generic, Literal, Protocol, TypeVar

QueueOrder = Literal["fcfs", "deadline"]


class Waiter(Protocol):
    @property
    def leave_by_s(self) -> float:
        """When it gives up waiting, on the worker's clock."""
        ...


W = TypeVar("W", bound=Waiter)


class Discipline(Protocol):
    """Whoever has the least key is next; of equals the one that came first."""

    def __call__(self, waiter: Waiter, /) -> float: ...


DISCIPLINES: Mapping[QueueOrder, Discipline] = {
    "fcfs": lambda _: 0.0,
    "deadline": lambda waiter: waiter.leave_by_s,
}


class WaitingQueue(Generic[W]):
    """In order of a discipline; waiters are told apart by identity."""

    def __init__(self, discipline: Discipline) -> None:
        self._discipline = discipline
        self._entries: list[tuple[tuple[float, int], W]] = []  # sorted; no two places are equal
        self._places: dict[W, tuple[float, int]] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[W]:
        return (waiter for _, waiter in self._entries)

    def push(self, waiter: W) -> None:
        self._num_pushed += 1
        place = self._places[waiter] = (self._discipline(waiter), self._num_pushed)
        insort(self._entries, (place, waiter))

    def peek(self) -> W | None:
        """Who is next, left in its place."""
        return self._entries[0][1] if self._entries else None

    def remove(self, waiter: W) -> bool:
        """Take out one, wherever it stands; False if it does not wait here."""
        place = self._places.pop(waiter, None)
        if place is None:
            return False
        del self._entries[bisect_left(self._entries, place, key=lambda entry: entry[0])]
        return True
