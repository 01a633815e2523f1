"""Paged attention in plain torch, for devices that have no Triton.

No shape and no branch depends on what a tensor holds, so that a step can be recorded and replayed
with other lengths. The price is work for keys that nobody sees: every tile of rows reads a whole
table's width.
"""

import torch
from torch import Tensor

from pdserve.engine.device.plan import AttentionPlan
from pdserve.engine.device.request import AttentionRequest

_MAX_VALUES = 1 << 26  # of K and V that are gathered at once


def attend_in_torch(call: AttentionRequest, plan: AttentionPlan) -> Tensor:
    """Store and attend as `pdserve.engine.device.op.paged_attention` says."""
    _store(call.key, call.k_cache, plan)
    _store(call.value, call.v_cache, plan)
    num_rows, heads = call.query.shape[:2]
    # One row more, where whatever belongs to no row goes.
    out = call.query.new_zeros(num_rows + 1, heads, call.value.shape[2])
    keys = plan.tables.shape[1] * call.k_cache.shape[1]
    values = keys * call.k_cache.shape[2] * (call.k_cache.shape[3] + call.v_cache.shape[3])
    at_once = max(1, _MAX_VALUES // values)
    for first in range(0, plan.tile_row.shape[0], at_once):
        _attend_tiles(call, plan, slice(first, first + at_once), out)
    return out[:num_rows]


def _store(rows: Tensor, cache: Tensor, plan: AttentionPlan) -> None:
    """Write `rows` [rows, kv_heads, dim] to their places.

    A padded row must leave no trace, and there is no index that means nowhere. So it repeats what
    some real row writes, to the same place; if all are padding, what is there already.
    """
    is_real = plan.row_blocks >= 0
    stand_in = is_real.to(torch.int32).argmax(0, keepdim=True)
    own = torch.arange(rows.shape[0], device=rows.device)
    source = torch.where(is_real, own, stand_in)
    blocks = plan.row_blocks.index_select(0, source).clamp(min=0).long()
    offsets = plan.row_offsets.index_select(0, source).long()
    held = cache[blocks, offsets]
    values = torch.where(is_real.any(), rows.index_select(0, source), held)
    cache.index_put_((blocks, offsets), values)


def _attend_tiles(call: AttentionRequest, plan: AttentionPlan, tiles: slice, out: Tensor) -> None:
    """Fill the rows of `out` that belong to `tiles`."""
    device = call.query.device
    num_rows, heads, _ = call.query.shape
    kv_heads = call.k_cache.shape[2]
    sequences = plan.tile_sequence[tiles].long()
    lengths = plan.tile_rows[tiles].long()
    places = torch.arange(call.rows_per_tile, device=device)
    rows = plan.tile_row[tiles].long()[:, None] + places  # [tiles, rows of a tile]
    is_live = places < lengths[:, None]
    skipped = rows - plan.firsts.index_select(0, sequences).long()[:, None]
    positions = plan.starts.index_select(0, sequences).long()[:, None] + skipped
    rows = torch.where(is_live, rows, num_rows)
    tables = plan.tables.index_select(0, sequences).long()
    key_at = torch.arange(tables.shape[1] * call.k_cache.shape[1], device=device)
    ends = positions[:, 0] + lengths
    is_held = (key_at < ends[:, None])[:, :, None, None]
    # What lies behind the end is another's, and may be no number: 0 * NaN is NaN.
    key = call.k_cache[tables].flatten(1, 2).float().masked_fill(~is_held, 0)
    value = call.v_cache[tables].flatten(1, 2).float().masked_fill(~is_held, 0)
    query = call.query.index_select(0, rows.clamp(max=num_rows - 1).flatten()).float()
    query = query.view(*rows.shape, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("trkgd,tnkd->tkgrn", query, key) * call.scaling
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    is_seen = _visible(call, positions[:, :, None], key_at) & is_live[:, :, None]
    scores = scores.masked_fill(~is_seen[:, None, None], -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.float().view(1, kv_heads, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[1]]
    mean = torch.einsum("tkgrn,tnkd->trkgd", weights, value)
    # Infinite queries can leave nothing but weights of zero, which would pass for numbers.
    mean = mean.masked_fill(~torch.isfinite(query).all(-1, keepdim=True), torch.nan)
    out.index_copy_(0, rows.flatten(), mean.reshape(-1, heads, mean.shape[-1]).to(out.dtype))


def _visible(call: AttentionRequest, rows: Tensor, keys: Tensor) -> Tensor:
    """Which of the positions `keys` [n] each of the positions `rows` [..., 1] sees."""
    mask = keys <= rows
    if call.window:
        mask = mask & (keys > rows - call.window)
    if call.chunk:
        mask = mask & (keys // call.chunk == rows // call.chunk)
    return mask
