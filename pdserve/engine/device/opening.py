"""From the name of a device to its runtime."""

import re

from pdserve.domain.errors import LocalFault
from pdserve.engine.device.runtime import DeviceRuntime

_CUDA = re.compile(r"cuda(?::(\d{1,3}))?")


def open_runtime(device: str) -> DeviceRuntime | None:
    """None for `cpu`: the engine of the host needs none. `LocalFault` for what there is not."""
    if device == "cpu":
        return None
    if not (match := _CUDA.fullmatch(device)):
        raise LocalFault(f"device must be cpu, cuda or cuda:N; got {device}")
    from pdserve.engine.device.cuda_runtime import CudaRuntime  # touches no GPU before it is made

    return CudaRuntime(int(match[1] or 0))
