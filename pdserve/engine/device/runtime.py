"""What the engine asks of the device that computes: memory, copies, order, recorded steps.

All else is torch's own operators, which know their device by their tensors. Work is done in the
order in which a thread submits it and may be late: the host learns that it is over from an event.
Whoever reads what a device wrote to pinned memory, or overwrites what a device is to read there,
waits for the event of that copy first.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class DeviceEvent(Protocol):
    def wait(self) -> None:
        """Block this thread until all work that was submitted before the event is done."""
        ...


class DeviceStream(Protocol):
    """Work in order, apart from that of other streams."""


class DeviceGraph(Protocol):
    """The operators of one call, recorded: addresses, shapes and Python values are fixed."""

    def replay(self) -> Any:
        """Submit all of them, on whatever their tensors hold by then; what the call returned."""
        ...


class PinnedMemory(Protocol):
    """Host memory that the device copies from and to on its own."""

    tensor: Tensor  # uint8 [num_bytes]

    def close(self) -> None:
        """Give it back, once no copy is under way; safe to call twice."""
        ...


class DeviceRuntime(Protocol):
    """One device. Any thread may call it."""

    device: torch.device
    num_processors: int
    """How many programs it runs at the same time, roughly."""

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the device, its content undefined."""
        ...

    def pinned(self, num_bytes: int) -> PinnedMemory:
        """Zeroed; whoever asked for it closes it."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Submit a copy between the device and pinned memory, or within the device."""
        ...

    def record(self) -> DeviceEvent:
        """An event behind all that this thread's stream was given."""
        ...

    def stream(self) -> DeviceStream: ...

    def on(self, stream: DeviceStream) -> AbstractContextManager[None]:
        """Submit this thread's work to `stream` meanwhile."""
        ...

    def capture(self, compute: Callable[[], Any], like: DeviceGraph | None = None) -> DeviceGraph:
        """Record `compute`, which has run before, as a graph; shares the memory of `like`.

        Graphs that share memory are replayed in turns, and the results of one last until the next.
        """
        ...

    def synchronize(self) -> None:
        """Wait for all streams."""
        ...

    def trim(self) -> None:
        """Give back what this process has used and freed again."""
        ...

    def free_bytes(self) -> int:
        """What nobody has; until `trim`, what was used and freed again is not among it."""
        ...

    def total_bytes(self) -> int: ...


class _Done:
    def wait(self) -> None:
        """What a host has computed is there."""


class _HostStream:
    pass


class _HostGraph:
    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute

    def replay(self) -> Any:
        return self._compute()


class HostMemory:
    """Pages of the host's own."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, num_bytes))
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]

    def close(self) -> None:
        """The pages go once nothing views them any more."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


class HostRuntime:
    """The CPU. Nothing is late, and memory is as large as the system lets it be."""

    device = torch.device("cpu")
    num_processors = 1

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def pinned(self, num_bytes: int) -> PinnedMemory:
        return HostMemory(num_bytes)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record(self) -> DeviceEvent:
        return _Done()

    def stream(self) -> DeviceStream:
        return _HostStream()

    @contextlib.contextmanager
    def on(self, stream: DeviceStream) -> Iterator[None]:
        yield

    def capture(self, compute: Callable[[], Any], like: DeviceGraph | None = None) -> DeviceGraph:
        """A replay computes anew."""
        return _HostGraph(compute)

    def synchronize(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def free_bytes(self) -> int:
        return self.total_bytes()

    def total_bytes(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


HOST = HostRuntime()
