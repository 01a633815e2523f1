"""The attention kernels compiled for GPUs that are not there, and what they take of one.

Run as a module, with TRITON_INTERPRET unset: `python -m tests.support.compiled_kernels [--all]`
prints a line of JSON for each kernel, variant and architecture.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pdserve.engine.device import kernels
from pdserve.engine.device.variants import (
    Variant,
    attend_constants,
    chunk_rows_per_tile,
    combine_constants,
    store_constants,
    tile_size,
    variants_of,
)
from tests.support.attention_kinds import REALISTIC, WORST

ARCHITECTURES = (80, 90, 100)
_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_SINGLES = {"factor": "fp32", "cap": "fp32", "part_sums": "*fp32", "part_tops": "*fp32"}
_PLAN = ("row_blocks", "row_offsets", "tables", "firsts", "starts", "tile_sequence", "tile_row")
_INDICES = dict.fromkeys((*_PLAN, "tile_rows"), "*i32")
_VALUES = ("query", "key", "value", "k_cache", "v_cache", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one kernel takes of a GPU, as its compiler says."""

    kernel: str
    architecture: int
    variant: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def usages(variant: Variant, architecture: int) -> Iterator[Usage]:
    """Of all kernels that `variant` launches."""
    size = tile_size(variant)
    options = {"num_warps": size.num_warps, "num_stages": size.num_stages}
    yield _usage("store", variant, architecture, store_constants(variant.kind), {"num_warps": 1})
    yield _usage("attend", variant, architecture, attend_constants(variant), options)
    if variant.is_split:
        constants = combine_constants(variant.kind)
        yield _usage("combine", variant, architecture, constants, {"num_warps": 4})


def _usage(
    name: str, variant: Variant, architecture: int, constants: Any, options: dict[str, int]
) -> Usage:
    function = getattr(kernels, f"{name}_kernel")
    pointer = _POINTERS[variant.kind.dtype]
    types = {**_SINGLES, **_INDICES, **dict.fromkeys(_VALUES, pointer), "sinks": "*fp32"}
    if name == "attend" and not variant.is_split:
        types |= {"part_sums": pointer, "part_tops": pointer}  # it gets `out`
    constants = dict(constants)
    if name == "attend" and not variant.kind.has_sinks:
        constants["sinks"] = None
    signature, aligned = {}, {}
    for place, parameter in enumerate(function.params):
        kind = types.get(parameter.name, "i32")
        signature[parameter.name] = "constexpr" if parameter.name in constants else kind
        if signature[parameter.name].startswith("*") and not parameter.do_not_specialize:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Usage(
        kernel=name,
        architecture=architecture,
        variant=f"{variant} {options}",
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of the stack of a thread: a kernel of ours has one for spills alone."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    local = re.search(r"LOCAL:(\d+)", told)
    if found is None or local is None:
        raise ValueError(f"cuobjdump says nothing of registers: {told[-300:]}")
    return int(found[1]), int(found[2]) + int(local[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every kind that models have")
    kinds = REALISTIC if parser.parse_args().all else WORST
    for kind in kinds:
        rows = (1, chunk_rows_per_tile([kind]))
        for variant in variants_of([kind], rows, is_split=(False, True)):
            for architecture in ARCHITECTURES:
                for usage in usages(variant, architecture):
                    print(json.dumps(asdict(usage)), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
