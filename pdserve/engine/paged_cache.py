"""Attention over the paged KV cache: K and V of each layer go to their blocks and are read back."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdserve.domain.invariants import check_invariant
from pdserve.domain.layout import BlockOrder
from pdserve.engine.attention import AttentionCall, attend_dense, first_visible
from pdserve.engine.kv_store import KvStore
from pdserve.engine.numba_attention import CompiledAttention
from pdserve.engine.numba_values import Values, as_values
from pdserve.engine.packing import PackedBatch

_MAX_COMPILED_PAIRS = 4096  # longer chunks are faster through SDPA, which blocks over queries
_NO_SINKS: npt.NDArray[np.float32] = np.zeros(0, dtype=np.float32)

_HOST = torch.device("cpu")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PagedCache:
    """KV memory as tensors: for each layer K and V of [num_blocks, block_size, kv_heads, head_dim].

    They are views of `kv`, strided over blocks, and within them as the layout's order has it;
    nothing here owns memory.
    """

    def __init__(self, kv: KvStore, compiled: CompiledAttention | None = None) -> None:
        """`compiled` attends short chunks and decode rows, of blocks that have tokens first;
        without it torch does.
        """
        layout = kv.layout
        has_tokens_first = layout.order is BlockOrder.TOKENS
        check_invariant(compiled is None or has_tokens_first, "compiled: tokens first", layout)
        self.block_size = layout.block_size
        self.compiled = compiled
        self.block_values = layout.block_bytes // layout.item_bytes
        self.offsets: list[tuple[int, int]] = []  # of each layer's K and V in a block, in values
        flat = kv.tensor().view(DTYPES[layout.dtype])
        self.memory = as_values(flat.view(-1)) if compiled else np.zeros(0, dtype=np.float32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for index, layer in enumerate(layout.layers):
            offset = layout.layer_offset_bytes(index) // layout.item_bytes
            k_size = layout.block_size * layer.num_kv_heads * layer.k_head_dim
            self.offsets.append((offset, offset + k_size))
            for views, head_dim in (
                (self.keys, layer.k_head_dim),
                (self.values, layer.v_head_dim),
            ):
                size = layout.block_size * layer.num_kv_heads * head_dim
                part = flat[:, offset : offset + size]
                if has_tokens_first:
                    shape = (kv.num_blocks, layout.block_size, layer.num_kv_heads, head_dim)
                    views.append(part.view(shape))
                else:
                    shape = (kv.num_blocks, layer.num_kv_heads, layout.block_size, head_dim)
                    views.append(part.view(shape).transpose(1, 2))
                offset += size


class PagedStep:
    """The attention of one step; made anew for each, so that nothing of a batch outlives it."""

    def __init__(self, cache: PagedCache, batch: PackedBatch, device: torch.device = _HOST) -> None:
        self._cache = cache
        self._batch = batch
        self._blocks = torch.from_numpy(batch.row_blocks).to(device)
        self._offsets = torch.from_numpy(batch.row_offsets).to(device)
        self._positions = torch.from_numpy(batch.positions).to(device)
        self._tables = torch.from_numpy(batch.tables).to(device)
        is_compiled = np.zeros(len(batch.lengths), dtype=np.bool_)
        if cache.compiled is not None:
            num_pairs = batch.lengths * (batch.starts + batch.lengths)
            is_compiled = (batch.lengths == 1) | (num_pairs <= _MAX_COMPILED_PAIRS)
        self._rows = np.flatnonzero(np.repeat(is_compiled, batch.lengths))
        self._row_tables = np.repeat(batch.table_firsts, batch.lengths)[self._rows]
        self._row_positions = batch.positions[self._rows]
        columns = (batch.firsts, batch.lengths, batch.starts, batch.table_firsts)
        self._spans = list(zip(*(column[~is_compiled].tolist() for column in columns), strict=True))

    def attend(self, call: AttentionCall) -> Tensor:
        """Rows beyond the batch's are not attended to, leave no KV and get zeros."""
        num_spare = call.query.shape[1] - self._batch.num_rows
        if num_spare:
            parts = (call.query, call.key, call.value)
            query, key, value = (part[:, : self._batch.num_rows] for part in parts)
            own = self.attend(replace(call, query=query, key=key, value=value))
            return torch.nn.functional.pad(own, (0, 0, 0, 0, 0, num_spare))
        self._store(call)
        if call.temperature is not None:
            factors = call.temperature.factors(self._positions).to(call.query.dtype)
            call = replace(call, query=call.query * factors[:, None])
        heads, rows, _ = call.query.shape
        out = call.query.new_empty(rows, heads, call.value.shape[-1])
        if len(self._rows):
            self._attend_compiled(call, out)
        for first, length, start, table_first in self._spans:
            result = self._attend_one(call, first, length, start, table_first)
            out[first : first + length] = result.transpose(0, 1)
        if self._spans and not torch.isfinite(call.query.sum(dtype=torch.float32)):
            # torch answers a query that is not finite with zeros, which would pass for numbers.
            out[~torch.isfinite(call.query).all(dim=2).all(dim=0)] = torch.nan
        return out

    def _store(self, call: AttentionCall) -> None:
        """Write the rows' K and V to their slots."""
        cache, batch = self._cache, self._batch
        parts = (call.key.transpose(0, 1), call.value.transpose(0, 1))  # [rows, kv_heads, head_dim]
        if cache.compiled is None:
            slots = (self._blocks, self._offsets)
            cache.keys[call.layer].index_put_(slots, parts[0])
            cache.values[call.layer].index_put_(slots, parts[1])
            return
        for part, offset in zip(parts, cache.offsets[call.layer], strict=True):
            values, stride = _flat_rows(part)
            cache.compiled.store(
                values,
                stride,
                part.shape[1] * part.shape[2],
                cache.memory,
                cache.block_values,
                offset,
                cache.block_size,
                batch.row_blocks,
                batch.row_offsets,
            )

    def _attend_compiled(self, call: AttentionCall, out: Tensor) -> None:
        cache = self._cache
        assert cache.compiled is not None
        kv_heads, _, k_head_dim = call.key.shape
        heads, v_head_dim = call.query.shape[0], call.value.shape[-1]
        cache.compiled.attend(
            *_flat_rows(call.query.transpose(0, 1)),
            cache.memory,
            cache.block_values,
            *cache.offsets[call.layer],
            (cache.block_size, heads, kv_heads, k_head_dim, v_head_dim, call.window, call.chunk),
            self._rows,
            self._row_positions,
            self._batch.tables,
            self._row_tables,
            call.scaling,
            call.softcap,
            _NO_SINKS if call.sinks is None else call.sinks.detach().float().numpy(),
            as_values(out.view(-1)),
        )

    def _attend_one(
        self, call: AttentionCall, first: int, length: int, start: int, table_first: int
    ) -> Tensor:
        """Rows of one sequence: [heads, length, v_head_dim]."""
        rows = slice(first, first + length)
        query = call.query[:, rows]
        if start == 0:
            return attend_dense(call, query, call.key[:, rows], call.value[:, rows], 0, 0)
        seen = first_visible(call, start)
        block_size = self._cache.block_size
        first_block, end_block = seen // block_size, -(-(start + length) // block_size)
        table = self._tables[table_first + first_block : table_first + end_block]
        context = slice(seen - first_block * block_size, start + length - first_block * block_size)
        key, value = (
            part[call.layer].index_select(0, table).flatten(0, 1)[context].transpose(0, 1)
            for part in (self._cache.keys, self._cache.values)
        )
        return attend_dense(call, query, key, value, start, seen)


def _flat_rows(part: Tensor) -> tuple[Values, int]:
    """[rows, heads, head_dim] as flat values, and how far apart its rows are there."""
    rows, heads, head_dim = part.shape
    if part.stride()[1:] != (head_dim, 1):
        part = part.contiguous()
    stride = part.stride(0)
    flat = part.as_strided(((rows - 1) * stride + heads * head_dim,), (1,))
    return as_values(flat), stride
