"""`DeviceRuntime` on an NVIDIA GPU: as little as possible, since only a GPU can run it."""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.engine.device.runtime import DeviceEvent, DeviceGraph, DeviceStream, PinnedMemory

_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class CudaRuntime:
    """Satisfies `DeviceRuntime`. Each thread has streams of its own choice (`on`)."""

    def __init__(self, index: int) -> None:
        """`LocalFault` if there is no such GPU, or if KV memory on it would be slow to read."""
        if not torch.cuda.is_available():
            raise LocalFault(
                f"device cuda:{index} needs an NVIDIA GPU and a CUDA build of torch; this is torch "
                f"{torch.__version__}, which sees none"
            )
        if index >= (count := torch.cuda.device_count()):
            raise LocalFault(f"device cuda:{index} does not exist: {count} GPUs are visible here")
        for name in _ALLOCATOR_SETTINGS:
            if "expandable_segments:true" in os.environ.get(name, "").lower():
                raise LocalFault(
                    f"{name} has expandable_segments:True, whose memory other processes and "
                    "network cards read at a hundredth of the speed; remove it"
                )
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self._properties: Any = torch.cuda.get_device_properties(self.device)
        self.num_processors: int = self._properties.multi_processor_count

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def pinned(self, num_bytes: int) -> PinnedMemory:
        return CudaPinned(num_bytes)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self) -> DeviceEvent:
        cuda: Any = torch.cuda
        event = cuda.Event(blocking=True)  # a waiting thread leaves its core to others
        event.record(torch.cuda.current_stream(self.device))
        return CudaEvent(event)

    def stream(self) -> DeviceStream:
        cuda: Any = torch.cuda
        made: torch.cuda.Stream = cuda.Stream(self.device)
        return made

    @contextlib.contextmanager
    def on(self, stream: DeviceStream) -> Iterator[None]:
        assert isinstance(stream, torch.cuda.Stream)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            yield

    def capture(self, compute: Callable[[], Any], like: DeviceGraph | None = None) -> DeviceGraph:
        return CudaGraph(compute, like)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]


class CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class CudaGraph:
    def __init__(self, compute: Callable[[], Any], like: DeviceGraph | None) -> None:
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        pool = None
        if like is not None:
            assert isinstance(like, CudaGraph)
            pool = like._graph.pool()
        # The watchdog thread of NCCL asks for events meanwhile, which a global capture forbids.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._results = compute()

    def replay(self) -> Any:
        self._graph.replay()
        return self._results


class CudaPinned:
    """Pages of our own, registered: torch's pinned memory is rounded up to powers of two."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, num_bytes))
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]
        self._place: int | None = self.tensor.data_ptr()
        cuda: Any = torch.cuda
        cudart = cuda.cudart()
        code = cudart.cudaHostRegister(self._place, max(1, num_bytes), 0)
        if int(code) != 0:
            raise LocalFault(
                f"{num_bytes} bytes of host memory cannot be pinned: CUDA says {code}; a "
                "container may limit locked memory (ulimit -l)"
            )

    def close(self) -> None:
        if self._place is None:
            return
        cuda: Any = torch.cuda
        cudart = cuda.cudart()
        cudart.cudaHostUnregister(self._place)
        self._place = None
        self.tensor = torch.empty(0, dtype=torch.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()
