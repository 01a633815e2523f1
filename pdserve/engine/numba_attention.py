"""Decode attention in compiled Python: reads K and V where they lie, block by block.

The scores of one row fit the cache, so there are two passes: scores, then the weighted sum; blocks
are the outer loop, so that each is read once, in order. Indices of inner loops are unsigned: for
signed ones numba also compiles Python's negative indexing, and such loops are not vectorised (23 ns
against 2.3 for 64 values).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LOG2_E = np.float32(1.44269504)


@numba.njit(fastmath=_FAST, inline="always")
def _exp(x: np.float32) -> np.float32:
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
    query: Floats, q: np.uint64, memory: Floats, k: np.uint64, stride: np.uint64,
    dim: np.uint64, scaling: np.float32, scores: Floats, first: np.uint64, count: np.uint64,
) -> None:  # fmt: skip
    """scores[first + i] = scaling * query[q :] · memory[k + i * stride :], `dim` values each."""
    for place in range(count):
        base = k + place * stride
        total = np.float32(0.0)
        for d in range(dim):
            total += query[q + d] * memory[base + d]
        scores[first + place] = total * scaling


@numba.njit(fastmath=_FAST, error_model="numpy")
def _accumulate(
    scores: Floats, first: np.uint64, count: np.uint64, memory: Floats, v: np.uint64,
    stride: np.uint64, dim: np.uint64, out: Floats, o: np.uint64,
) -> None:  # fmt: skip
    """out[o :] += sum of scores[first + i] * memory[v + i * stride :]; four i for each load."""
    whole = count // np.uint64(4)
    for quad in range(whole):
        s = first + quad * np.uint64(4)
        w0, w1 = scores[s], scores[s + np.uint64(1)]
        w2, w3 = scores[s + np.uint64(2)], scores[s + np.uint64(3)]
        b0 = v + quad * np.uint64(4) * stride
        b1, b2, b3 = b0 + stride, b0 + stride + stride, b0 + stride + stride + stride
        for d in range(dim):
            out[o + d] += (
                w0 * memory[b0 + d]
                + w1 * memory[b1 + d]
                + w2 * memory[b2 + d]
                + w3 * memory[b3 + d]
            )
    for place in range(whole * np.uint64(4), count):
        weight, base = scores[first + place], v + place * stride
        for d in range(dim):
            out[o + d] += weight * memory[base + d]


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
    total = _exp(sink - top) if sink > -np.inf else np.float32(0.0)
    for place in range(count):
        weight = _exp(scores[first + place] - top)
        scores[first + place] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for place in range(count):
        scores[first + place] *= inverse


def _decode_attention(
    query: Floats,
    memory: Floats,
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
    out: Floats,
) -> None:
    """Attend each of `rows` to its sequence up to its own position; writes their rows of `out`.

    query: [all rows, heads, k_head_dim] and out: [all rows, heads, v_head_dim], both flat
    memory: all KV memory; a block has `block_values` values, this layer's K and V begin at
    `k_offset` and `v_offset` in it; sizes: block_size, heads, kv_heads, k_head_dim, v_head_dim,
    window, chunk (as in `AttentionCall`); positions, table_firsts: [rows]; sinks: [heads], or empty
    """
    block_size, heads, kv_heads, k_dim, v_dim, window, chunk = sizes
    groups = heads // kv_heads
    k_stride, v_stride = kv_heads * k_dim, kv_heads * v_dim
    most = np.max(positions) + 1
    scores = np.empty(heads * most, dtype=np.float32)
    factor, cap = np.float32(scaling), np.float32(softcap)
    for index in range(len(rows)):
        row, end, table = rows[index], positions[index] + 1, table_firsts[index]
        first = max(0, end - window) if window else 0
        if chunk:
            first = max(first, (end - 1) // chunk * chunk)
        first_block, end_block = first // block_size, (end + block_size - 1) // block_size
        for block in range(first_block, end_block):
            low, high = max(first, block * block_size), min(end, (block + 1) * block_size)
            base = tables[table + block] * block_values + k_offset
            base += (low - block * block_size) * k_stride
            for head in range(heads):
                _score(
                    query, np.uint64((row * heads + head) * k_dim),
                    memory, np.uint64(base + head // groups * k_dim),
                    np.uint64(k_stride), np.uint64(k_dim), factor,
                    scores, np.uint64(head * most + low - first), np.uint64(high - low),
                )  # fmt: skip
        for head in range(heads):
            sink = sinks[head] if len(sinks) else np.float32(-np.inf)
            _normalise(scores, np.uint64(head * most), np.uint64(end - first), cap, sink)
        for value in range(row * heads * v_dim, (row + 1) * heads * v_dim):
            out[value] = np.float32(0.0)
        for block in range(first_block, end_block):
            low, high = max(first, block * block_size), min(end, (block + 1) * block_size)
            base = tables[table + block] * block_values + v_offset
            base += (low - block * block_size) * v_stride
            for head in range(heads):
                _accumulate(
                    scores, np.uint64(head * most + low - first), np.uint64(high - low),
                    memory, np.uint64(base + head // groups * v_dim),
                    np.uint64(v_stride), np.uint64(v_dim),
                    out, np.uint64((row * heads + head) * v_dim),
                )  # fmt: skip


def _store_rows(
    source: Floats,
    memory: Floats,
    block_values: int,
    offset: int,
    block_size: int,
    row_blocks: Ints,
    row_offsets: Ints,
) -> None:
    """Copy each row of `source`, flat [rows, width], to its place in its block of `memory`.

    The part of a block that is written begins `offset` values into it: [block_size, width].
    """
    width = len(source) // len(row_blocks)
    for row in range(len(row_blocks)):
        first = np.uint64(row_blocks[row] * block_values + offset + row_offsets[row] * width)
        base = np.uint64(row * width)
        for place in range(np.uint64(width)):
            memory[first + place] = source[base + place]


@dataclass(frozen=True, slots=True)
class CompiledAttention:
    """Parameters: see `_decode_attention` and `_store_rows`."""

    attend: Callable[..., None]
    store: Callable[..., None]


@functools.cache
def compile_attention() -> CompiledAttention:
    """Compile for this machine (seconds), or take what an earlier process left on disk."""
    attend, store = _compile(_decode_attention), _compile(_store_rows)
    floats, ints = np.zeros(8, dtype=np.float32), np.zeros(1, dtype=np.int64)
    sizes = (1, 1, 1, 4, 4, 0, 0)
    attend(
        floats[:4], floats, 8, 0, 4, sizes, ints, ints, ints, ints, 1.0, 0.0, floats[:0], floats[:4]
    )
    store(floats[:4], floats, 8, 0, 1, ints, ints)
    return CompiledAttention(attend, store)


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled code is kept in `__pycache__`, else in the user's cache, else nowhere."""
    options: dict[str, Any] = {"fastmath": _FAST, "error_model": "numpy", "nogil": True}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        compiled = numba.njit(**options)(function)
    result: Callable[..., None] = compiled
    return result
