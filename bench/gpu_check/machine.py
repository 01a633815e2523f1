"""The device under test, and how work on it is timed."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A GPU in full sizes, or the CPU in small ones."""

    device: torch.device
    is_gpu: bool

    def size(self, on_gpu: T, on_cpu: T) -> T:
        return on_gpu if self.is_gpu else on_cpu

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def median_s(self, work: Callable[[], object], repeats: int = 20, warmups: int = 3) -> float:
        """Of one call, by the device's own clock; once and by the host's clock on the CPU."""
        if not self.is_gpu:
            began_s = time.perf_counter()
            work()
            return time.perf_counter() - began_s
        for _ in range(warmups):
            work()
        times = []
        for _ in range(repeats):
            start, end = (_timing_event() for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        return statistics.median(times)

    def ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def copy_bytes_per_s(self) -> float:
        """Read and written by a copy that is many times larger than any cache."""
        source = torch.empty(self.size(4 << 30, 1 << 24), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.median_s(lambda: target.copy_(source), 10)

    def matrix_flops(self) -> float:
        """Of a product of large bfloat16 matrices of random numbers."""
        side = self.size(8192, 128)
        left, right = (
            torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2)
        )
        return float(2 * side**3) / self.median_s(lambda: left @ right, 10)


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def open_machine(device: str) -> Machine:
    """`SystemExit` if there is no such device."""
    opened = torch.device(device)
    if opened.type == "cpu":
        torch.set_num_threads(1)
        return Machine(device=opened, is_gpu=False)
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; --device cpu runs in small sizes")
    torch.cuda.set_device(opened)
    return Machine(device=torch.device("cuda", torch.cuda.current_device()), is_gpu=True)
