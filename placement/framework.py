"""What a serving framework adds to its kernels, and how it batches.

Isolated kernel times add up to less than a served step takes: hosts schedule, sample, detokenise
and stream; kernels leave gaps; clocks sink under load. These few numbers say by how much. They
were fitted over all rows of `bench/latency_fidelity` at once, per framework, never to one row.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources

from pydantic import Field

from pdserve.config.base import Settings, parse_settings
from pdserve.domain.errors import LocalFault


class Framework(Settings):
    """Corrections to composed kernel times, and the batching rules of one framework."""

    name: str = Field(description="Framework, and its family where that matters.")
    step_s: float = Field(0.0, ge=0, description="Host time of every step.")
    request_s: float = Field(0.0, ge=0, description="Host time per request in a decode step.")
    prefill_step_s: float = Field(0.0, ge=0, description="Extra host time of a step with prefill.")
    layer_s: float = Field(0.0, ge=0, description="Gaps between kernels, per layer.")
    prompt_token_s: float = Field(
        0.0, ge=0, description="Tokenizing and admission before a prompt's first step, per token."
    )
    prompt_s: float = Field(0.0, ge=0, description="The same per request.")
    gemm_scale: float = Field(1.0, gt=0, description="Served over isolated GEMM time, decode.")
    prefill_scale: float = Field(1.0, gt=0, description="Served over isolated time, large steps.")
    attention_scale: float = Field(1.0, gt=0, description="The same for decode attention.")
    comm_scale: float = Field(1.0, gt=0, description="The same for all-reduces.")
    relative_error: float = Field(0.1, ge=0, description="Median error of step times seen.")


DEFAULT_FRAMEWORK = "pdserve"


@cache
def frameworks() -> Mapping[str, Framework]:
    """The fitted frameworks by name."""
    path = resources.files("placement") / "data" / "frameworks.json"
    listed = json.loads(path.read_text(encoding="utf-8"))["frameworks"]
    parsed = [parse_settings(Framework, entry, source="frameworks.json") for entry in listed]
    return {framework.name: framework for framework in parsed}


def find_framework(name: str = DEFAULT_FRAMEWORK) -> Framework:
    """Look one up; raises `LocalFault` with the known names."""
    known = frameworks()
    if name not in known:
        raise LocalFault(f"unknown framework {name!r}; known: {', '.join(known)}")
    return known[name]
