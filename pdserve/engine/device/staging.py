"""Small arrays of a step on their way to the device, and back."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdserve.engine.device.runtime import DeviceEvent, DeviceRuntime, PinnedMemory

Bytes = npt.NDArray[np.uint8]

_FIRST_BYTES = 1 << 16


class Stager:
    """Two pinned buffers that take turns: one is filled while the other's copy may be under way.

    A buffer is overwritten only after the event of its last copy.
    """

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._slots = [_Slot(runtime), _Slot(runtime)]

    def take(self, num_bytes: int) -> Bytes:
        """Memory to write to until `send`; its content is what it was."""
        self._slots.reverse()
        return self._slots[0].take(num_bytes)

    def send(self, num_bytes: int, target: Tensor | None = None) -> Tensor:
        """Submit the copy of what was taken last: to the start of `target`, or to new memory."""
        if target is None:
            target = self._runtime.empty(num_bytes, dtype=torch.uint8)
        self._slots[0].send(target[:num_bytes])
        return target

    def close(self) -> None:
        for slot in self._slots:
            slot.close()


class _Slot:
    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._memory: PinnedMemory = runtime.pinned(_FIRST_BYTES)
        self._sent: DeviceEvent | None = None
        self._num_taken = 0

    def take(self, num_bytes: int) -> Bytes:
        if self._sent is not None:
            self._sent.wait()
            self._sent = None
        if num_bytes > len(self._memory.tensor):
            self._memory.close()
            self._memory = self._runtime.pinned(1 << (num_bytes - 1).bit_length())
        taken: Bytes = self._memory.tensor[:num_bytes].numpy()
        return taken

    def send(self, target: Tensor) -> None:
        self._runtime.copy(target, self._memory.tensor[: len(target)])
        self._sent = self._runtime.record()

    def close(self) -> None:
        if self._sent is not None:
            self._sent.wait()
        self._memory.close()


class Fetcher:
    """Results of a step on their way to the host, all readable after one event.

    Two pinned buffers take turns: one can be read while the other's copies may be under way.
    """

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._memories: list[PinnedMemory] = [runtime.pinned(_FIRST_BYTES) for _ in range(2)]

    def fetch(self, *parts: Tensor) -> "Fetched":
        """Submit copies of tensors of the device; those of the fetch before the last are gone."""
        sizes = [-(-part.numel() * part.element_size() // 8) * 8 for part in parts]
        self._memories.reverse()
        if sum(sizes) > len(self._memories[0].tensor):
            self._memories[0].close()
            self._memories[0] = self._runtime.pinned(1 << (sum(sizes) - 1).bit_length())
        memory = self._memories[0].tensor
        at, copies = 0, []
        for part, size in zip(parts, sizes, strict=True):
            num_bytes = part.numel() * part.element_size()
            copy = memory[at : at + num_bytes].view(part.dtype).view(part.shape)
            self._runtime.copy(copy, part)
            copies.append(copy)
            at += size
        return Fetched(tuple(copies), self._runtime.record())

    def close(self) -> None:
        for memory in self._memories:
            memory.close()


class Fetched:
    def __init__(self, copies: tuple[Tensor, ...], event: DeviceEvent) -> None:
        self._copies, self._event = copies, event

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, on the host, once all that was submitted before them is done."""
        self._event.wait()
        return self._copies
