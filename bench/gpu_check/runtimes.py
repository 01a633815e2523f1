"""The product's device runtime for the machine under test."""

import contextlib
from collections.abc import Iterator

from bench.gpu_check.machine import Machine
from pdserve.engine.device.opening import open_runtime
from pdserve.engine.device.runtime import DeviceRuntime


@contextlib.contextmanager
def opened_runtime(machine: Machine) -> Iterator[DeviceRuntime]:
    """That of the GPU; in place of one the simulated device, which refuses what a GPU would."""
    if runtime := open_runtime(str(machine.device)):
        yield runtime
        return
    from tests.support.sim_device import SimRuntime

    with SimRuntime() as simulated:
        yield simulated
