"""What machine this is, and its two ceilings, which later parts are held against."""

import importlib.metadata
from collections.abc import Iterator

import torch

from bench.gpu_check.findings import Finding
from bench.gpu_check.machine import Machine

_PACKAGES = ("torch", "triton", "transformers", "numpy", "vllm", "nixl-cu13")


def measure(machine: Machine) -> Iterator[Finding]:
    for package in _PACKAGES:
        yield Finding(what=package, value=_version(package))
    if machine.is_gpu:
        properties = torch.cuda.get_device_properties(machine.device)
        free, total = torch.cuda.mem_get_info(machine.device)
        yield Finding(what="GPU", value=properties.name, note=f"CUDA {torch.version.cuda}")
        yield Finding(what="multiprocessors", value=float(properties.multi_processor_count))
        yield Finding(what="free memory", value=free / 2**30, unit="GiB",
                      note=f"of {total / 2**30:.0f}")  # fmt: skip
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield Finding(what="NCCL", value=".".join(map(str, version)),
                      note="two ranks on one GPU need 2.30")  # fmt: skip
    yield Finding(what="copy within the device", value=machine.copy_bytes_per_s() / 1e12,
                  unit="TB/s", note="read and written")  # fmt: skip
    yield Finding(what="bfloat16 matrix product", value=machine.matrix_flops() / 1e12,
                  unit="TFLOP/s", note="random numbers")  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
