"""Groups of two ranks of torch.distributed, and the slots that their bytes pass through.

Groups are made by constructor: `init_process_group` would fix one world for the whole process.
Everything that is not a coroutine blocks, by a deadline, and belongs on one thread.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from pdserve.engine.kv_store import BlockRun, KvStore

_dist: Any = torch.distributed  # much of what is used here has no types

NUM_SLOTS = 2
"""Of each end: one is filled or emptied while the other one travels."""


class ExchangeStore(_dist.Store):  # type: ignore[misc]
    """Where the two find each other: each tells the other whatever it sets.

    It needs no port of its own, and who is not at the other end of `tell` cannot reach it.
    """

    def __init__(self, tell: Callable[[str, bytes], None], deadline_s: float) -> None:
        super().__init__()
        self._tell = tell
        self._deadline_s = deadline_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_lost = False

    @property
    def num_keys(self) -> int:
        return len(self._values)

    def hear(self, key: str, value: bytes) -> None:
        """The other one has set it."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def lose(self) -> None:
        """The other one is gone: whoever waits for it fails."""
        with self._changed:
            self._is_lost = True
            self._changed.notify_all()

    def set(self, key: str, value: bytes | str) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self.hear(key, value)
        self._tell(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit_s = min(self._deadline_s, timeout.total_seconds() if timeout else self._deadline_s)
        with self._changed:
            self._changed.wait_for(lambda: self._is_lost or self.check(keys), limit_s)
            if not self.check(keys):
                raise RuntimeError("the other rank did not come")

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def has_extended_api(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTerms:
    """What one end of a group is made by."""

    rank: int  # 0: the owner of the blocks; 1: who reads them
    host: str  # where the other end reaches this one
    slot_bytes: int
    make_s: float  # deadline of making it
    move_s: float  # of each operation


class PairGroup(Protocol):
    """One end of a group of two, with `NUM_SLOTS` slots of its own."""

    def send(self, slot: int, num_bytes: int) -> None:
        """Raises `TimeoutError` or `ConnectionResetError`: the group is of no use any more."""
        ...

    def receive(self, slot: int, num_bytes: int) -> None: ...

    async def gather(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        """Fill the slot's `remote` blocks from `memory`."""
        ...

    async def scatter(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        """Write blocks of `memory` from the slot. Cancelled, it raises once it writes no more."""
        ...

    def close(self) -> None: ...


class GlooPair:
    """For memory that the host reaches. gloo's `abort` wakes nobody: the deadline does."""

    def __init__(self, store: ExchangeStore, terms: PairTerms) -> None:
        self._peer = 1 - terms.rank
        self._deadline_s = terms.move_s
        self._timeout = timedelta(seconds=terms.move_s)
        self._slots = [torch.empty(terms.slot_bytes, dtype=torch.uint8) for _ in range(NUM_SLOTS)]
        buffers: list[Any] = [slot.numpy() for slot in self._slots]
        self._buffers = [memoryview(buffer) for buffer in buffers]
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=terms.host)]
        options._timeout = timedelta(seconds=terms.make_s)
        options._threads = 1
        self._group: Any = failing_in(
            terms.make_s, lambda: _dist.ProcessGroupGloo(store, terms.rank, 2, options)
        )

    def send(self, slot: int, num_bytes: int) -> None:
        part = [self._slots[slot][:num_bytes]]
        failing_in(
            self._deadline_s, lambda: self._group.send(part, self._peer, 0).wait(self._timeout)
        )

    def receive(self, slot: int, num_bytes: int) -> None:
        part = [self._slots[slot][:num_bytes]]
        failing_in(
            self._deadline_s, lambda: self._group.recv(part, self._peer, 0).wait(self._timeout)
        )

    async def gather(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        await memory.copy_out(self._buffers[slot], runs)

    async def scatter(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        await memory.copy_in(self._buffers[slot], runs)

    def close(self) -> None:
        """Ends its threads and sockets, which is what stops operations that were given up."""
        self._group = None


def failing_in(deadline_s: float, work: Callable[[], Any]) -> Any:
    """torch's errors here are many kinds of `RuntimeError`, with texts that name addresses."""
    began_s = time.monotonic()
    try:
        return work()
    except RuntimeError:
        if time.monotonic() - began_s >= 0.9 * deadline_s:  # its clock is not ours
            raise TimeoutError from None
        raise ConnectionResetError("the group broke") from None
