"""How much of the GPU's matrix rate attention of prompts reaches, beside torch's own kernels."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu_check.findings import Finding
from bench.gpu_check.machine import Machine
from bench.gpu_check.paged_rows import BLOCK_SIZE, PagedMemory, Rows, Shape


def measure(machine: Machine) -> Iterator[Finding]:
    dtype = machine.size(torch.bfloat16, torch.float32)
    dim = machine.size(128, 16)
    shape = Shape(heads=32, kv_heads=8, dim=dim, num_layers=1, dtype=dtype)
    peak = machine.matrix_flops()
    for start, count in machine.size([(0, 2048), (0, 8192), (16384, 1024)], [(0, 24), (20, 8)]):
        memory = PagedMemory(machine, shape, -(-(start + count) // BLOCK_SIZE))
        flops = shape.pair_flops(count * start + count * (count + 1) // 2)
        for rows_per_tile in machine.size((8, 16, 32), (4,)):
            rows = Rows(machine, shape, memory, [(start, count)], rows_per_tile)
            with torch.inference_mode():
                rate = flops / machine.median_s(partial(rows.attend, 1), 5)
            yield _finding(f"tiles of {rows_per_tile} rows", start, count, rate, peak)
        rate = flops / _library_s(machine, shape, start, count)
        yield _finding("torch's scaled_dot_product_attention", start, count, rate, peak)


def _library_s(machine: Machine, shape: Shape, start: int, count: int) -> float:
    """The same attention over K and V that lie together, heads repeated beforehand."""
    query, key, value = (
        torch.randn(1, shape.heads, rows, shape.dim, device=machine.device).to(shape.dtype)
        for rows in (count, start + count, start + count)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = None
    if start:
        positions = torch.arange(start + count, device=machine.device)
        mask = positions[None, :] <= positions[start:, None]
    return machine.median_s(lambda: attend(query, key, value, mask, is_causal=not start), 5)


def _finding(what: str, start: int, count: int, rate: float, peak: float) -> Finding:
    where = f" after {start}" if start else ""
    return Finding(
        what=f"{what}, {count} rows{where}",
        value=rate / 1e12,
        unit="TFLOP/s",
        note=f"{100 * rate / peak:.0f} % of the matrix rate",
    )
