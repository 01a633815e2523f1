"""GPU types: memory, bandwidth, arithmetic, links, price and power; and a user's own."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pdserve.config.base import Settings, parse_settings, read_yaml
from pdserve.domain.errors import LocalFault
from placement.tables.measured import MEASURED_SYSTEMS

GIB = 2**30
Positive = Annotated[float, Field(gt=0)]


class Gpu(Settings):
    """One GPU type. Rates are datasheet peaks, dense; directions of a link count once."""

    name: str = Field(description="Short name used in plans, such as h100_sxm.")
    memory_gib: Positive = Field(description="Usable device memory in GiB.")
    memory_gb_per_s: Positive = Field(description="Memory bandwidth, 10^9 bytes/s.")
    bf16_tflops: Positive = Field(description="Dense bfloat16 TFLOP/s.")
    fp8_tflops: Positive | None = Field(None, description="Dense fp8; left out: none.")
    fp4_tflops: Positive | None = Field(None, description="Dense fp4; left out: none.")
    tdp_w: Positive = Field(description="Board power in watts.")
    gpus_per_node: int = Field(8, ge=1, description="GPUs in one usual node.")
    intra_node_gb_per_s: Positive = Field(description="One GPU to its node, one way, 10^9 bytes/s.")
    inter_node_gb_per_s: Positive = Field(description="One GPU to other nodes, one way.")
    usd_per_hour: Positive | None = Field(
        None, description="Price of one GPU hour; an assumption of ours unless you set it."
    )
    tables: str | None = Field(None, description="Measured tables to use: name of a system.")
    source: str = Field("user", description="Where the numbers come from.")

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * GIB)

    def flops(self, dtype: str) -> float:
        """Peak operations a second; falls back to the next wider type the GPU has."""
        rates = {"bfloat16": self.bf16_tflops, "fp8": self.fp8_tflops, "fp4": self.fp4_tflops}
        for name in {"fp4": ("fp4", "fp8"), "fp8": ("fp8",)}.get(dtype, ()):
            rate = rates[name]
            if rate is not None:
                return rate * 1e12
        return self.bf16_tflops * 1e12

    @property
    def has_tables(self) -> bool:
        return self.tables in MEASURED_SYSTEMS


class GpuFile(Settings):
    """A YAML file of additional or replaced GPU types."""

    gpus: list[Gpu] = Field(description="GPU types; a known name replaces the catalogue's.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A path that KV travels: a message of n bytes takes `latency_s + n / bytes_per_s`."""

    bytes_per_s: float
    latency_s: float

    def transfer_s(self, num_bytes: float, num_lanes: int = 1) -> float:
        """Time for `num_bytes` over `num_lanes` equal GPUs' links at once."""
        if num_bytes <= 0:
            return 0.0
        return self.latency_s + num_bytes / num_lanes / self.bytes_per_s


LINK_EFFICIENCY = 0.8  # of the datasheet rate, as measured plateaus show
LINK_LATENCY_S = 2e-5


def node_link(gpu: Gpu) -> Link:
    """GPU to GPU inside a node."""
    return _link(gpu.intra_node_gb_per_s)


def network_link(gpu: Gpu) -> Link:
    """GPU to GPU between nodes, one network card each."""
    return _link(gpu.inter_node_gb_per_s)


def _link(gb_per_s: float) -> Link:
    return Link(bytes_per_s=gb_per_s * 1e9 * LINK_EFFICIENCY, latency_s=LINK_LATENCY_S)


@cache
def catalogue() -> Mapping[str, Gpu]:
    """The built-in GPU types by name."""
    path = resources.files("placement") / "data" / "hardware" / "gpus.json"
    listed = json.loads(path.read_text(encoding="utf-8"))
    file = parse_settings(GpuFile, {"gpus": listed["gpus"]}, source="gpus.json")
    return {gpu.name: gpu for gpu in file.gpus}


def load_gpus(path: Path | None = None) -> dict[str, Gpu]:
    """The catalogue with the user's file on top; raises `LocalFault` for a bad file."""
    gpus = dict(catalogue())
    if path is not None:
        file = parse_settings(GpuFile, read_yaml(path), source=str(path))
        gpus.update({gpu.name: gpu for gpu in file.gpus})
    return gpus


def find_gpu(name: str, gpus: Mapping[str, Gpu] | None = None) -> Gpu:
    """Look a type up (case, dashes and a bare `h100` allowed); raises with the nearest names."""
    known = catalogue() if gpus is None else gpus
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    for candidate in (name, key, f"{key}_sxm"):
        if candidate in known:
            return known[candidate]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    raise LocalFault(f"unknown GPU {name!r}; {hint} `pdserve gpus` lists them all")
