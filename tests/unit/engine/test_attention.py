"""Compiled and gathered attention against a double loop over positions, in double precision."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.attention import AttentionCall
from pdserve.engine.contract import SequenceStep, StepBatch
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.numba_attention import compile_attention
from pdserve.engine.packing import pack
from pdserve.engine.paged_cache import DTYPES, PagedCache, PagedStep

torch.set_num_threads(1)

BLOCK_SIZE = 4
NUM_BLOCKS = 40
HEADS = 12  # 6 (4 and 2 more), 4, 2 and 1 for each KV head
LAYERS = (LayerKv(2, 8, 8), LayerKv(3, 12, 5), LayerKv(6, 8, 8), LayerKv(12, 20, 20))
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "chunk": {"chunk": 6},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
    "window, softcap, sinks": {"window": 5, "softcap": 3.0, "sinks": torch.zeros(HEADS)},
}


# Compiled attention rounds its result once, however short its numbers are.
PATHS = {
    "float32, compiled": ("float32", True, 0.0),
    "float32, gathered": ("float32", False, 0.0),
    "bfloat16, compiled": ("bfloat16", True, 2**-8),
    "float16, compiled": ("float16", True, 2**-11),
}


def layout_of(layers: tuple[LayerKv, ...], dtype: str = "float32") -> KvLayout:
    item_bytes = DTYPES[dtype].itemsize
    return KvLayout(layers=layers, block_size=BLOCK_SIZE, dtype=dtype, item_bytes=item_bytes)


def reference(call: AttentionCall, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """call.query: [heads, rows, dim] of one sequence; keys, values: [positions, kv_heads, dim]."""
    heads, num_rows, _ = call.query.shape
    out = torch.zeros(num_rows, heads, values.shape[-1], dtype=torch.float64)
    groups = heads // keys.shape[1]
    for row in range(num_rows):
        position = start + row
        seen = [
            other
            for other in range(position + 1)
            if (not call.window or other > position - call.window)
            and (not call.chunk or other // call.chunk == position // call.chunk)
        ]
        for head in range(heads):
            key = keys[seen, head // groups].double()
            scores = key @ call.query[head, row].double() * call.scaling
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            weights = torch.exp(scores)
            total = weights.sum()
            if call.sinks is not None:
                total = total + math.exp(float(call.sinks[head]))
            out[row, head] = weights @ values[seen, head // groups].double() / total
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", range(len(LAYERS)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_batch_attends_as_defined(variant: str, layer: int, path: str) -> None:
    dtype, is_compiled, rounding = PATHS[path]
    kv = KvMemory(layout_of(LAYERS, dtype), NUM_BLOCKS)
    cache = PagedCache(kv, compile_attention(dtype) if is_compiled else None)
    generator = torch.Generator().manual_seed(1)
    shape = LAYERS[layer]
    blocks = [BlockId(block) for block in range(NUM_BLOCKS)]
    random.Random(3).shuffle(blocks)
    spans = [(0, 9), (10, 1), (13, 5), (0, 1), (23, 1)]  # (tokens in the cache, rows)
    tables = [tuple(blocks[7 * index : 7 * index + 7]) for index in range(len(spans))]
    keys, values = (
        [
            torch.randn(28, shape.num_kv_heads, head_dim, generator=generator).to(DTYPES[dtype])
            for _ in spans
        ]
        for head_dim in (shape.k_head_dim, shape.v_head_dim)
    )
    for table, key, value, (start, _) in zip(tables, keys, values, spans, strict=True):
        for position in range(start):
            block, offset = divmod(position, BLOCK_SIZE)
            cache.keys[layer][table[block], offset] = key[position]
            cache.values[layer][table[block], offset] = value[position]
    batch = StepBatch(
        tuple(
            SequenceStep(token_ids=(1,) * rows, start=start, block_table=table)
            for table, (start, rows) in zip(tables, spans, strict=True)
        )
    )
    num_rows = sum(rows for _, rows in spans)
    query = torch.randn(HEADS, num_rows, shape.k_head_dim, generator=generator).to(DTYPES[dtype])
    fresh = [slice(start, start + rows) for start, rows in spans]
    call = AttentionCall(
        layer=layer,
        query=query,
        key=torch.cat([key[part] for key, part in zip(keys, fresh, strict=True)]).transpose(0, 1),
        value=torch.cat([each[part] for each, part in zip(values, fresh, strict=True)]).transpose(
            0, 1
        ),
        scaling=0.4,
        **VARIANTS[variant],  # type: ignore[arg-type]
    )

    out = PagedStep(cache, pack(batch, BLOCK_SIZE)).attend(call)

    first = 0
    for key, value, (start, rows) in zip(keys, values, spans, strict=True):
        part = slice(first, first + rows)
        alone = AttentionCall(
            layer=layer,
            query=query[:, part],
            key=key,
            value=value,
            scaling=0.4,
            **VARIANTS[variant],  # type: ignore[arg-type]
        )
        expected = reference(alone, key, value, start)
        assert bool(
            ((out[part].double() - expected).abs() <= 2e-6 + rounding * expected.abs()).all()
        )
        first += rows


def test_packing_lays_sequences_end_to_end() -> None:
    batch = StepBatch(
        (
            SequenceStep(
                token_ids=(5, 6, 7), start=13, block_table=(BlockId(9),) * 3 + (BlockId(2),)
            ),
            SequenceStep(token_ids=(8,), start=2, block_table=(BlockId(4),)),
        )
    )
    packed = pack(batch, 4)
    assert packed.token_ids.tolist() == [5, 6, 7, 8]
    assert packed.positions.tolist() == [13, 14, 15, 2]
    assert packed.row_blocks.tolist() == [2, 2, 2, 4]
    assert packed.row_offsets.tolist() == [1, 2, 3, 2]
    assert packed.table_firsts.tolist() == [0, 4]
    assert packed.sampled_rows.tolist() == []


def test_block_table_that_is_too_short_is_a_bug() -> None:
    step = SequenceStep(token_ids=(1, 2), start=3, block_table=(BlockId(0),))
    with pytest.raises(AssertionError, match="covers its sequence"):
        pack(StepBatch((step,)), 4)


def test_memory_of_other_layers_and_blocks_is_left_alone() -> None:
    layout = layout_of(LAYERS)
    kv = KvMemory(layout, 3)
    cache = PagedCache(kv)
    step = SequenceStep(token_ids=(1,), start=1, block_table=(BlockId(1),))
    ones = torch.ones(3, 1, 12)
    call = AttentionCall(
        layer=1, query=torch.ones(HEADS, 1, 12), key=ones, value=ones[..., :5], scaling=1.0
    )
    PagedStep(cache, pack(StepBatch((step,)), BLOCK_SIZE)).attend(call)
    words = np.frombuffer(kv.bytes, dtype=np.float32)
    written = np.flatnonzero(words)
    base = layout.block_bytes // 4 + layout.layer_offset_bytes(1) // 4
    k_slot = range(base + 36, base + 72)
    v_slot = range(base + BLOCK_SIZE * 36 + 15, base + BLOCK_SIZE * 36 + 30)
    assert written.tolist() == [*k_slot, *v_slot]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_lost(part: str, bad: float, path: str) -> None:
    """torch gives zeros for a query of NaN; such a row must not pass for a good one."""
    dtype, is_compiled, _ = PATHS[path]
    kv = KvMemory(layout_of(LAYERS[:1], dtype), 3)
    cache = PagedCache(kv, compile_attention(dtype) if is_compiled else None)
    generator = torch.Generator().manual_seed(1)
    shape = LAYERS[0]
    sizes = {
        "query": (HEADS, shape.k_head_dim),
        "key": (shape.num_kv_heads, shape.k_head_dim),
        "value": (shape.num_kv_heads, shape.v_head_dim),
    }
    parts = {
        name: torch.randn(heads, 6, dim, generator=generator).to(DTYPES[dtype])
        for name, (heads, dim) in sizes.items()
    }
    parts[part][:, 3, 0] = bad
    step = SequenceStep(token_ids=(1,) * 6, start=0, block_table=(BlockId(2), BlockId(0)))
    query, key, value = (parts[name] for name in sizes)
    call = AttentionCall(layer=0, scaling=0.4, query=query, key=key, value=value)
    out = PagedStep(cache, pack(StepBatch((step,)), BLOCK_SIZE)).attend(call)
    assert not torch.isfinite(out[3]).all()
    if part != "value":
        assert torch.isfinite(out[:3]).all()
