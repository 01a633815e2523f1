"""Launches the Triton kernels of `pdserve.engine.device.kernels`."""

import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pdserve.engine.device.plan import PADDING, AttentionPlan, PlanShape
from pdserve.engine.device.request import AttentionRequest
from pdserve.engine.device.variants import (
    AttentionKind,
    Variant,
    attend_constants,
    check_tile,
    combine_constants,
    row_alignment,
    store_constants,
    tile_size,
    variants_of,
)

_LOG2_E = math.log2(math.e)
_ALIGN_BYTES = 16  # of what Triton takes to be aligned


def attend_in_triton(call: AttentionRequest, plan: AttentionPlan) -> Tensor:
    """Store and attend as `pdserve.engine.device.op.paged_attention` says."""
    kernels = _kernels()
    kind = call.kind()
    variant = Variant(kind=kind, rows_per_tile=call.rows_per_tile, is_split=call.splits > 1)
    launch = _launch(variant)
    rows, heads, _ = call.query.shape
    out = call.query.new_empty(rows, heads, kind.v_head_dim)
    query, key, value = (_laid_out(part, kind) for part in (call.query, call.key, call.value))
    kernels.store_kernel[(rows, kind.kv_heads)](
        key, key.stride(0), value, value.stride(0), call.k_cache, call.v_cache, out,
        plan.row_blocks, plan.row_offsets, **launch.store,
    )  # fmt: skip
    sums, tops = out, out
    if variant.is_split:
        shape = (rows, heads, call.splits)
        sums = torch.empty(*shape, kind.v_head_dim, dtype=torch.float32, device=out.device)
        tops = torch.empty(*shape, 2, dtype=torch.float32, device=out.device)
    factor, cap = call.scaling * _LOG2_E, 0.0
    if kind.is_capped:
        factor, cap = call.scaling / call.softcap, call.softcap * _LOG2_E
    kernels.attend_kernel[(plan.tile_row.shape[0], kind.kv_heads, call.splits)](
        query, query.stride(0), call.k_cache, call.v_cache, out, sums, tops, plan.tables,
        plan.tables.stride(0), plan.firsts, plan.starts, plan.tile_sequence, plan.tile_row,
        plan.tile_rows, call.sinks, factor, cap, call.splits,
        **launch.attend,
    )  # fmt: skip
    if variant.is_split:
        kernels.combine_kernel[(rows, heads)](
            sums, tops, out, plan.row_blocks, call.splits, **launch.combine
        )
    return out


def warm(calls: Iterable[AttentionRequest], *, rows_per_tile: Sequence[int]) -> int:
    """Compile all that steps with calls like these can launch, so that none compiles while serving.

    `calls` has one for each layer, of any batch: its K and V, its sinks and its features count, and
    its rows do not. `rows_per_tile` are the tiles that steps will have. Nothing is stored. Returns
    how many launches it took; variants that were compiled before, also by earlier processes, are
    taken from Triton's cache on disk.
    """
    done = set()
    for call in calls:
        kind = call.kind()
        # Triton specialises on the alignment of memory too, which a layout can make differ.
        places = [part.data_ptr() % _ALIGN_BYTES == 0 for part in (call.k_cache, call.v_cache)]
        sinks = None if call.sinks is None else call.sinks.dtype
        for variant in variants_of([kind], rows_per_tile, is_split=(False, True)):
            key = (variant, *places, sinks)
            if key in done:
                continue
            done.add(key)
            attend_in_triton(*_empty_call(call, variant))
    return len(done)


def _empty_call(call: AttentionRequest, variant: Variant) -> tuple[AttentionRequest, AttentionPlan]:
    """One padded row, which touches no memory but its own result."""
    device = call.k_cache.device
    kind = variant.kind
    shapes = (kind.heads, kind.k_head_dim), (kind.kv_heads, kind.k_head_dim)
    query, key, value = (
        torch.zeros(1, *shape, dtype=call.query.dtype, device=device)
        for shape in (*shapes, (kind.kv_heads, kind.v_head_dim))
    )
    shape = PlanShape.decode(1, width=1)
    memory = torch.zeros(shape.num_values, dtype=torch.int32, device=device)
    plan = AttentionPlan.over(memory, shape)
    plan.row_blocks.fill_(PADDING)
    empty = replace(
        call,
        query=query,
        key=key,
        value=value,
        splits=2 if variant.is_split else 1,
        rows_per_tile=variant.rows_per_tile,
    )
    return empty, plan


@dataclass(frozen=True, slots=True)
class _Launch:
    """Constants and options of a variant's three kernels."""

    store: dict[str, Any]
    attend: dict[str, Any]
    combine: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _launch(variant: Variant) -> _Launch:
    """`LocalFault` for tiles that no kernel is made for."""
    check_tile(variant.kind, variant.rows_per_tile)
    size = tile_size(variant)
    attend = attend_constants(variant, is_interpreted=_kernels().IS_INTERPRETED)
    options = {"num_warps": size.num_warps, "num_stages": size.num_stages}
    return _Launch(
        store={**store_constants(variant.kind), "num_warps": 1},
        attend={**attend, **options},
        combine={**combine_constants(variant.kind), "num_warps": 4},
    )


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("pdserve.engine.device.kernels")


def _laid_out(part: Tensor, kind: AttentionKind) -> Tensor:
    """`part` [rows, heads, dim] with heads side by side, its rows as aligned as promised."""
    is_fit = part.stride()[1:] == (part.shape[2], 1)
    is_fit = is_fit and part.stride(0) % row_alignment(kind) == 0
    if is_fit and part.data_ptr() % _ALIGN_BYTES == 0:
        return part
    return part.clone(memory_format=torch.contiguous_format)
