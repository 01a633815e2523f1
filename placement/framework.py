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
    prompt_s: float = Field(0.0, ge=0, description="Frontend time of a new request, one by one.")
    prompt_token_s: float = Field(0.0, ge=0, description="The same per prompt token.")
    token_s: float = Field(0.0, ge=0, description="Frontend time of one token sent, one by one.")
    reply_s: float = Field(0.0, ge=0, description="Delay of every reply; occupies nothing.")
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


def find_framework(name: str = DEFAULT_FRAMEWORK, *details: str) -> Framework:
    """The most specific entry: `vllm-fp8-h200_sxm`, else `vllm-fp8`, else `vllm`.

    `details` are precision, GPU and so on in that order; raises `LocalFault` for an unknown name.
    """
    known = frameworks()
    for length in range(len(details), -1, -1):
        key = "-".join((name, *details[:length]))
        if key in known:
            return known[key]
    heads = sorted({key.split("-")[0] for key in known})
    raise LocalFault(f"unknown framework {name!r}; known: {', '.join(heads)}")
