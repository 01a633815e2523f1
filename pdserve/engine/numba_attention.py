"""Decode attention in compiled Python: reads K and V where they lie, block by block.

The scores of one row fit the cache, so there are two passes: scores, then the weighted sum; blocks
are the outer loop, so that each is read once, in order. Four query heads that share a KV head share
its loads. While one block is computed the next one is fetched, a little with each position: blocks
lie scattered, so the processor does not foresee them (64 rows of 56 positions, 8/2 heads of 64, not
in the cache: 213 us; without sharing and fetching 390). Values of two bytes are computed as float32
like all others (see `numba_values`), and rounded once, at the end. Indices of inner loops are
unsigned: for signed ones numba also compiles Python's negative indexing, and such loops are not
vectorised (23 ns against 2.3 for 64 values).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from pdserve.engine.kernel_cache import stamp_of, use_cache
from pdserve.engine.numba_values import KINDS, Values, fetch, load_value, store_value

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Result = TypeVar("Result")

_FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LOG2_E = np.float32(1.44269504)


@numba.njit(fastmath=_FAST, inline="always")
def exp_negative(x: np.float32) -> np.float32:
    """exp(x) for x <= 0, to 1e-7 relative; branch-free, so loops of it vectorise (Cephes expf)."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power: np.float32 = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    result: np.float32 = p * power
    return result


@numba.njit(fastmath=_FAST, error_model="numpy")
def _score(
    query: Floats, q: np.uint64, memory: Values, k: np.uint64, stride: np.uint64,
    dim: np.uint64, scaling: np.float32, scores: Floats, first: np.uint64, count: np.uint64,
    ahead: np.uint64,
) -> None:  # fmt: skip
    """scores[first + i] = scaling * query[q :] · memory[k + i * stride :], `dim` values each.

    Fetches what lies likewise at `ahead`, unless that is 0.
    """
    for place in range(count):
        base = k + place * stride
        if ahead:
            fetch(memory, ahead + place * stride, dim)
        total = np.float32(0.0)
        for d in range(dim):
            total += query[q + d] * load_value(memory, base + d)
        scores[first + place] = total * scaling


@numba.njit(fastmath=_FAST, error_model="numpy")
def _score_four(
    query: Floats, q: np.uint64, memory: Values, k: np.uint64, stride: np.uint64,
    dim: np.uint64, scaling: np.float32, scores: Floats, first: np.uint64, count: np.uint64,
    ahead: np.uint64, most: np.uint64,
) -> None:  # fmt: skip
    """`_score` of four heads, whose queries are `dim` apart and whose scores are `most` apart."""
    q1, q2, q3 = q + dim, q + dim + dim, q + dim + dim + dim
    first1, first2, first3 = first + most, first + most + most, first + most + most + most
    for place in range(count):
        base = k + place * stride
        if ahead:
            fetch(memory, ahead + place * stride, dim)
        total0 = total1 = total2 = total3 = np.float32(0.0)
        for d in range(dim):
            key = load_value(memory, base + d)
            total0 += query[q + d] * key
            total1 += query[q1 + d] * key
            total2 += query[q2 + d] * key
            total3 += query[q3 + d] * key
        scores[first + place] = total0 * scaling
        scores[first1 + place] = total1 * scaling
        scores[first2 + place] = total2 * scaling
        scores[first3 + place] = total3 * scaling


@numba.njit(fastmath=_FAST, error_model="numpy")
def _accumulate(
    scores: Floats, first: np.uint64, count: np.uint64, memory: Values, v: np.uint64,
    stride: np.uint64, dim: np.uint64, out: Floats, o: np.uint64, ahead: np.uint64,
) -> None:  # fmt: skip
    """out[o :] += sum of scores[first + i] * memory[v + i * stride :]; four i for each load.

    Fetches what lies likewise at `ahead`, unless that is 0.
    """
    if ahead:
        for place in range(count):
            fetch(memory, ahead + place * stride, dim)
    whole = count // np.uint64(4)
    for quad in range(whole):
        s = first + quad * np.uint64(4)
        w0, w1 = scores[s], scores[s + np.uint64(1)]
        w2, w3 = scores[s + np.uint64(2)], scores[s + np.uint64(3)]
        b0 = v + quad * np.uint64(4) * stride
        b1, b2, b3 = b0 + stride, b0 + stride + stride, b0 + stride + stride + stride
        for d in range(dim):
            out[o + d] += (
                w0 * load_value(memory, b0 + d)
                + w1 * load_value(memory, b1 + d)
                + w2 * load_value(memory, b2 + d)
                + w3 * load_value(memory, b3 + d)
            )
    for place in range(whole * np.uint64(4), count):
        weight, base = scores[first + place], v + place * stride
        for d in range(dim):
            out[o + d] += weight * load_value(memory, base + d)


@numba.njit(fastmath=_FAST, error_model="numpy")
def _accumulate_four(
    scores: Floats, first: np.uint64, count: np.uint64, memory: Values, v: np.uint64,
    stride: np.uint64, dim: np.uint64, out: Floats, o: np.uint64, ahead: np.uint64,
    most: np.uint64,
) -> None:  # fmt: skip
    """`_accumulate` of four heads (see `_score_four`); two i for each load."""
    o1, o2, o3 = o + dim, o + dim + dim, o + dim + dim + dim
    for pair in range(count // np.uint64(2)):
        place = pair * np.uint64(2)
        s0 = first + place
        s1, s2, s3 = s0 + most, s0 + most + most, s0 + most + most + most
        a0, a1, a2, a3 = scores[s0], scores[s1], scores[s2], scores[s3]
        one = np.uint64(1)
        b0, b1, b2, b3 = scores[s0 + one], scores[s1 + one], scores[s2 + one], scores[s3 + one]
        base = v + place * stride
        other = base + stride
        if ahead:
            fetch(memory, ahead + place * stride, dim)
            fetch(memory, ahead + place * stride + stride, dim)
        for d in range(dim):
            x, y = load_value(memory, base + d), load_value(memory, other + d)
            out[o + d] += a0 * x + b0 * y
            out[o1 + d] += a1 * x + b1 * y
            out[o2 + d] += a2 * x + b2 * y
            out[o3 + d] += a3 * x + b3 * y
    if count % np.uint64(2):
        place = count - np.uint64(1)
        s0 = first + place
        s1, s2, s3 = s0 + most, s0 + most + most, s0 + most + most + most
        a0, a1, a2, a3 = scores[s0], scores[s1], scores[s2], scores[s3]
        base = v + place * stride
        for d in range(dim):
            x = load_value(memory, base + d)
            out[o + d] += a0 * x
            out[o1 + d] += a1 * x
            out[o2 + d] += a2 * x
            out[o3 + d] += a3 * x


@numba.njit(fastmath=_FAST, error_model="numpy")
def _normalise(
    scores: Floats, first: np.uint64, count: np.uint64, softcap: np.float32, sink: np.float32
) -> None:
    """Turn scores into weights: softmax, after the soft cap, beside the sink (-inf is none)."""
    if softcap > 0:
        for place in range(count):
            value = math.tanh(scores[first + place] / softcap)
            scores[first + place] = softcap * np.float32(value)
    top = sink
    for place in range(count):
        top = max(top, scores[first + place])
    total = exp_negative(sink - top) if sink > -np.inf else np.float32(0.0)
    for place in range(count):
        weight = exp_negative(scores[first + place] - top)
        scores[first + place] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for place in range(count):
        scores[first + place] *= inverse


@numba.njit(error_model="numpy", inline="always")
def _score_block(
    query: Floats, memory: Values, k: int, shape: tuple[int, int, int],
    scaling: np.float32, scores: Floats, first: int, count: int, most: int, ahead: int,
) -> None:  # fmt: skip
    """`_score` of all heads; shape: kv_heads, heads for each of them, dim."""
    kv_heads, groups, dim = shape
    for kv in range(kv_heads):
        base, stride, reach = k + kv * dim, kv_heads * dim, ahead + kv * dim
        for member in range(0, groups - 3, 4):
            head = kv * groups + member
            _score_four(
                query, np.uint64(head * dim), memory, np.uint64(base), np.uint64(stride),
                np.uint64(dim), scaling, scores, np.uint64(head * most + first), np.uint64(count),
                np.uint64(reach), np.uint64(most),
            )  # fmt: skip
            reach = 0
        for member in range(groups // 4 * 4, groups):
            head = kv * groups + member
            _score(
                query, np.uint64(head * dim), memory, np.uint64(base), np.uint64(stride),
                np.uint64(dim), scaling, scores, np.uint64(head * most + first), np.uint64(count),
                np.uint64(reach),
            )  # fmt: skip
            reach = 0


@numba.njit(error_model="numpy", inline="always")
def _accumulate_block(
    scores: Floats, first: int, count: int, most: int, memory: Values, v: int,
    shape: tuple[int, int, int], out: Floats, ahead: int,
) -> None:  # fmt: skip
    """`_accumulate` of all heads; shape: kv_heads, heads for each of them, dim."""
    kv_heads, groups, dim = shape
    for kv in range(kv_heads):
        base, stride, reach = v + kv * dim, kv_heads * dim, ahead + kv * dim
        for member in range(0, groups - 3, 4):
            head = kv * groups + member
            _accumulate_four(
                scores, np.uint64(head * most + first), np.uint64(count), memory, np.uint64(base),
                np.uint64(stride), np.uint64(dim), out, np.uint64(head * dim),
                np.uint64(reach), np.uint64(most),
            )  # fmt: skip
            reach = 0
        for member in range(groups // 4 * 4, groups):
            head = kv * groups + member
            _accumulate(
                scores, np.uint64(head * most + first), np.uint64(count), memory, np.uint64(base),
                np.uint64(stride), np.uint64(dim), out, np.uint64(head * dim),
                np.uint64(reach),
            )  # fmt: skip
            reach = 0


@numba.njit(inline="always")
def _first_seen(end: int, window: int, chunk: int) -> int:
    """The first position that the row at `end` - 1 attends to."""
    first: int = max(0, end - window) if window else 0
    return max(first, (end - 1) // chunk * chunk) if chunk else first


def _decode_attention(
    query: Values,
    query_stride: int,
    memory: Values,
    block_values: int,
    k_offset: int,
    v_offset: int,
    sizes: tuple[int, int, int, int, int, int, int],
    rows: Ints,
    positions: Ints,
    tables: Ints,
    table_firsts: Ints,
    scaling: float,
    softcap: float,
    sinks: Floats,
    out: Values,
) -> None:
    """Attend each of `rows` to its sequence up to its own position; writes their rows of `out`.

    query: [all rows, heads, k_head_dim], rows `query_stride` values apart
    out: [all rows, heads, v_head_dim], flat like `query`
    memory: all KV memory; a block has `block_values` values, this layer's K and V begin at
    `k_offset` and `v_offset` in it; sizes: block_size, heads, kv_heads, k_head_dim, v_head_dim,
    window, chunk (as in `AttentionCall`); positions, table_firsts: [rows]; sinks: [heads], or empty
    """
    block_size, heads, kv_heads, k_dim, v_dim, window, chunk = sizes
    groups = heads // kv_heads
    k_stride, v_stride = kv_heads * k_dim, kv_heads * v_dim
    most = int(np.max(positions)) + 1
    scores = np.empty(heads * most, dtype=np.float32)
    asked = np.empty(heads * k_dim, dtype=np.float32)
    total = np.empty(heads * v_dim, dtype=np.float32)
    factor, cap = np.float32(scaling), np.float32(softcap)
    for index in range(len(rows)):
        row, end, table = rows[index], positions[index] + 1, table_firsts[index]
        first = _first_seen(end, window, chunk)
        first_block, end_block = first // block_size, (end + block_size - 1) // block_size
        source = np.uint64(row * query_stride)
        for place in range(np.uint64(len(asked))):
            asked[place] = load_value(query, source + place)
        for block in range(first_block, end_block):
            low, high = max(first, block * block_size), min(end, (block + 1) * block_size)
            base = tables[table + block] * block_values + k_offset
            base += (low - block * block_size) * k_stride
            if block + 1 < end_block:
                ahead = tables[table + block + 1] * block_values + k_offset
            else:
                ahead = tables[table + first_block] * block_values + v_offset
            _score_block(
                asked, memory, base, (kv_heads, groups, k_dim), factor,
                scores, low - first, high - low, most, ahead,
            )  # fmt: skip
        for head in range(heads):
            sink = sinks[head] if len(sinks) else np.float32(-np.inf)
            _normalise(scores, np.uint64(head * most), np.uint64(end - first), cap, sink)
        total[:] = np.float32(0.0)
        for block in range(first_block, end_block):
            low, high = max(first, block * block_size), min(end, (block + 1) * block_size)
            base = tables[table + block] * block_values + v_offset
            base += (low - block * block_size) * v_stride
            if block + 1 < end_block:
                ahead = tables[table + block + 1] * block_values + v_offset
            elif index + 1 < len(rows):
                next_block = _first_seen(positions[index + 1] + 1, window, chunk) // block_size
                ahead = tables[table_firsts[index + 1] + next_block] * block_values + k_offset
            else:
                ahead = base  # nothing
            _accumulate_block(
                scores, low - first, high - low, most, memory, base, (kv_heads, groups, v_dim),
                total, ahead,
            )  # fmt: skip
        target = np.uint64(row * heads * v_dim)
        for place in range(np.uint64(len(total))):
            store_value(out, target + place, total[place])


def _store_rows(
    source: Values,
    stride: int,
    width: int,
    memory: Values,
    block_values: int,
    offset: int,
    block_size: int,
    row_blocks: Ints,
    row_offsets: Ints,
) -> None:
    """Copy rows of `width` values, `stride` apart in `source`, to their blocks of `memory`.

    The part of a block that is written begins `offset` values into it: [block_size, width].
    """
    for row in range(len(row_blocks)):
        first = np.uint64(row_blocks[row] * block_values + offset + row_offsets[row] * width)
        base = np.uint64(row * stride)
        for place in range(np.uint64(width)):
            store_value(memory, first + place, load_value(source, base + place))


@dataclass(frozen=True, slots=True)
class CompiledAttention:
    """Parameters: see `_decode_attention` and `_store_rows`."""

    attend: Callable[..., None]
    store: Callable[..., None]


@functools.cache
def compile_attention(dtype: str) -> CompiledAttention:
    """Compile for this machine (seconds), or take what an earlier process left on disk."""
    attend, store = compile_function(_decode_attention), compile_function(_store_rows)
    values, ints = np.zeros(8, dtype=KINDS[dtype]), np.zeros(1, dtype=np.int64)
    sizes = (1, 1, 1, 4, 4, 0, 0)
    rows = (ints, ints, ints, ints)
    sinks = np.zeros(0, dtype=np.float32)
    attend(values[:4], 4, values, 8, 0, 4, sizes, *rows, 1.0, 0.0, sinks, values[:4])
    store(values[:4], 4, 4, values, 8, 0, 1, ints, ints)
    return CompiledAttention(attend, store)


def compile_function(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compiled code is kept on disk where that is possible: see `pdserve.engine.kernel_cache`."""
    options: dict[str, Any] = {"fastmath": _FAST, "error_model": "numpy", "nogil": True}
    compiled: Callable[..., Result] = use_cache(numba.njit(**options)(function), _stamp())
    return compiled


@functools.cache
def _stamp() -> str:
    """A compiled function has those that it calls inside it, from any of these files."""
    return stamp_of(Path(__file__).parent.glob("numba_*.py"))
