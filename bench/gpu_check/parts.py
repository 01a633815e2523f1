"""The parts of the check, most important first; each is imported only in its own process."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.gpu_check.findings import Finding

_MODEL = (
    *("torch", "transformers", "safetensors", "tokenizers", "numba"),
    *("structlog", "pydantic", "yaml", "rich"),
)
_SERVING = (
    *_MODEL, "grpc", "grpc_health", "grpc_reflection", "google.protobuf", "google.rpc",
    "prometheus_client", "typer", "uvloop",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`module` in this package has `measure(machine)`; `most_s`: it is ended after that time."""

    name: str
    module: str
    answers: str
    most_s: float
    needs: tuple[str, ...] = ("torch",)
    needs_gpu: bool = False

    def missing(self) -> list[str]:
        """Packages that it needs and that are not here."""
        return [name for name in self.needs if not _is_installed(name)]

    def measure(self, machine: Any) -> Iterator[Finding]:
        module = importlib.import_module(f"bench.gpu_check.{self.module}")
        measure: Callable[[Any], Iterator[Finding]] = module.measure
        return measure(machine)


PARTS = (
    Part(
        name="machine",
        module="machine_part",
        answers="versions, copy bandwidth, matrix rate",
        most_s=60,
    ),
    Part(
        name="kernels",
        module="kernels_part",
        answers="every attention path against float32 on the CPU",
        most_s=150,
        needs=("torch", "triton", "numpy"),
    ),
    Part(
        name="graphs",
        module="graphs_part",
        answers="recorded decode steps beside the same steps launched eagerly",
        most_s=90,
        needs=(*_MODEL, "triton"),
    ),
    Part(
        name="serving",
        module="serving_part",
        answers="prefill and decode workers that share the GPU, as `pdserve up` starts them",
        most_s=150,
        needs=(*_SERVING, "triton"),
    ),
    Part(
        name="memory",
        module="memory_part",
        answers="draws, digests and copies of blocks: as on the host, and how fast",
        most_s=60,
        needs=_MODEL,
    ),
    Part(
        name="decode",
        module="decode_part",
        answers="decode attention against bandwidth, by order in a block and splits",
        most_s=120,
        needs=("torch", "triton", "numpy"),
    ),
    Part(
        name="models",
        module="model_part",
        answers="whole steps: decode against bandwidth, prefill against the matrix rate",
        most_s=150,
        needs=(*_MODEL, "triton"),
    ),
    Part(
        name="prefill",
        module="prefill_part",
        answers="attention of prompts against the matrix rate, beside torch's",
        most_s=60,
        needs=("torch", "triton", "numpy"),
    ),
    Part(
        name="nccl",
        module="nccl_part",
        answers="a communicator's memory, and how fast it is given up",
        most_s=40,
        needs_gpu=True,
    ),
    Part(
        name="nixl",
        module="nixl_part",
        answers="KV read by nixl between two pools of the GPU",
        most_s=60,
        needs=(*_MODEL, "nixl_cu13"),
    ),
    Part(
        name="peers",
        module="peers_part",
        answers="the engine beside other engines",
        most_s=200,
        needs=(*_MODEL, "triton", "tokenizers"),
    ),
)


def part_named(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package inside one that is missing
        return False
