"""`torch.ops.pdserve.paged_attention`: paged attention as one operator, on any device.

One operator, so that whatever looks at operators (graphs that are recorded, `torch.compile`, a
simulated device) sees neither kernels nor launches. Two implementations stand behind it: Triton's
on CUDA devices, and plain torch wherever there is no Triton.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from pdserve.engine.device.plan import AttentionPlan
from pdserve.engine.device.request import AttentionRequest
from pdserve.engine.device.torch_attention import attend_in_torch

AUTO, TRITON, TORCH = "auto", "triton", "torch"

torch.library.define(
    "pdserve::paged_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor row_blocks, Tensor row_offsets, Tensor tables, Tensor firsts, Tensor starts, "
    "Tensor tile_sequence, Tensor tile_row, Tensor tile_rows, Tensor? sinks, "
    "float scaling, int window, int chunk, float softcap, int splits, int rows_per_tile, "
    "str kernels) -> Tensor",
)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scaling: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    splits: int = 1,
    rows_per_tile: int = 1,
    kernels: str = AUTO,
) -> Tensor:
    """Store the rows' K and V, then have each row attend to its sequence up to itself.

    Arguments are those of `AttentionRequest`. Returns [rows, heads, v_head_dim]: zeros in padded
    rows, and NaN in heads whose query is not finite. `kernels`: `triton`, `torch`, or `auto`, which
    takes Triton where it can be used.
    """
    result: Tensor = torch.ops.pdserve.paged_attention(
        query,
        key,
        value,
        k_cache,
        v_cache,
        plan.row_blocks,
        plan.row_offsets,
        plan.tables,
        plan.firsts,
        plan.starts,
        plan.tile_sequence,
        plan.tile_row,
        plan.tile_rows,
        sinks,
        scaling,
        window,
        chunk,
        softcap,
        splits,
        rows_per_tile,
        kernels,
    )
    return result


@functools.cache
def triton_obstacle(device_type: str) -> str | None:
    """Why the kernels of Triton cannot serve devices of this type; None if they can.

    An engine says it once when it is loaded; the operator takes torch then.
    """
    if device_type != "cuda":
        return f"they are for cuda devices; this one is {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


@torch.library.impl("pdserve::paged_attention", "CompositeExplicitAutograd")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row_blocks: Tensor,
    row_offsets: Tensor,
    tables: Tensor,
    firsts: Tensor,
    starts: Tensor,
    tile_sequence: Tensor,
    tile_row: Tensor,
    tile_rows: Tensor,
    sinks: Tensor | None,
    scaling: float,
    window: int,
    chunk: int,
    softcap: float,
    splits: int,
    rows_per_tile: int,
    kernels: str,
) -> Tensor:
    call = AttentionRequest(
        query=query,
        key=key,
        value=value,
        k_cache=k_cache,
        v_cache=v_cache,
        scaling=scaling,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=sinks,
        splits=splits,
        rows_per_tile=rows_per_tile,
    )
    plan = AttentionPlan(
        row_blocks=row_blocks,
        row_offsets=row_offsets,
        tables=tables,
        firsts=firsts,
        starts=starts,
        tile_sequence=tile_sequence,
        tile_row=tile_row,
        tile_rows=tile_rows,
    )
    if kernels == TORCH or (kernels == AUTO and triton_obstacle(query.device.type)):
        return attend_in_torch(call, plan)
    from pdserve.engine.device.triton_attention import attend_in_triton  # imports triton

    return attend_in_triton(call, plan)


def _shape_alone(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


torch.library.register_fake("pdserve::paged_attention", _shape_alone)
