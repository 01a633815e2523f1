"""Decode attention in compiled Python: reads K and V where they lie, block by block.

For one row and one KV head all scores fit the cache, so there are two passes: scores, then the
weighted sum. Indices of inner loops are unsigned: for signed ones numba also compiles Python's
negative indexing, and the loops are then not vectorised (23 ns against 2.3 for 64 values).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DecodeAttention = Callable[..., None]  # parameters: see `_decode_attention`

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
def _score(query: Floats, tile: Floats, stride: int, scaling: np.float32, scores: Floats) -> None:
    """scores[i] = scaling * query · tile[i * stride :]."""
    size = np.uint64(len(query))
    for place in range(len(scores)):
        base = np.uint64(place * stride)
        total = np.float32(0.0)
        for d in range(size):
            total += query[d] * tile[base + d]
        scores[place] = total * scaling


@numba.njit(fastmath=_FAST, error_model="numpy")
def _accumulate(weights: Floats, tile: Floats, stride: int, out: Floats) -> None:
    """out += sum of weights[i] * tile[i * stride :], four at a time to spare loads of `out`."""
    size, step = np.uint64(len(out)), np.uint64(stride)
    whole = len(weights) // 4 * 4
    for place in range(0, whole, 4):
        w0, w1, w2, w3 = (
            weights[place],
            weights[place + 1],
            weights[place + 2],
            weights[place + 3],
        )
        b0 = np.uint64(place * stride)
        b1, b2, b3 = b0 + step, b0 + step + step, b0 + step + step + step
        for d in range(size):
            out[d] += w0 * tile[b0 + d] + w1 * tile[b1 + d] + w2 * tile[b2 + d] + w3 * tile[b3 + d]
    for place in range(whole, len(weights)):
        weight, base = weights[place], np.uint64(place * stride)
        for d in range(size):
            out[d] += weight * tile[base + d]


@numba.njit(fastmath=_FAST, error_model="numpy")
def _normalise(scores: Floats, softcap: np.float32, sinks: Floats, head: int) -> None:
    """Turn scores into weights: softmax, after the soft cap and beside the sink if there are."""
    if softcap > 0:
        for place in range(len(scores)):
            scores[place] = softcap * np.float32(math.tanh(scores[place] / softcap))
    top = scores[0]
    for place in range(len(scores)):
        top = max(top, scores[place])
    if len(sinks):
        top = max(top, sinks[head])
    total = np.float32(0.0)
    for place in range(len(scores)):
        weight = _exp(scores[place] - top)
        scores[place] = weight
        total += weight
    if len(sinks):
        total += _exp(sinks[head] - top)
    inverse = np.float32(1.0) / total
    for place in range(len(scores)):
        scores[place] *= inverse


def _decode_attention(
    query: Floats,
    memory: Floats,
    block_values: int,
    k_offset: int,
    v_offset: int,
    sizes: tuple[int, int, int, int, int, int],
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

    query: [all rows, heads, k_head_dim], out: [all rows, heads, v_head_dim], contiguous
    memory: all KV memory; a block has `block_values` values, this layer's K and V begin at
    `k_offset` and `v_offset` in it; sizes: block_size, kv_heads, k_head_dim, v_head_dim, window,
    chunk (as in `AttentionCall`); positions, table_firsts: [rows]; sinks: [heads], or empty
    """
    block_size, kv_heads, k_dim, v_dim, window, chunk = sizes
    groups = query.shape[1] // kv_heads
    k_stride, v_stride = kv_heads * k_dim, kv_heads * v_dim
    scores = np.empty((groups, np.max(positions) + 1), dtype=np.float32)
    for index in range(len(rows)):
        row, end, table = rows[index], positions[index] + 1, table_firsts[index]
        first = max(0, end - window) if window else 0
        if chunk:
            first = max(first, (end - 1) // chunk * chunk)
        first_block, end_block = first // block_size, (end + block_size - 1) // block_size
        for kv_head in range(kv_heads):
            for block in range(first_block, end_block):
                low, high = max(first, block * block_size), min(end, (block + 1) * block_size)
                base = tables[table + block] * block_values + k_offset + kv_head * k_dim
                tile = memory[base + (low - block * block_size) * k_stride :]
                for group in range(groups):
                    line = scores[group, low - first : high - first]
                    _score(
                        query[row, kv_head * groups + group],
                        tile,
                        k_stride,
                        np.float32(scaling),
                        line,
                    )
            for group in range(groups):
                head = kv_head * groups + group
                _normalise(scores[group, : end - first], np.float32(softcap), sinks, head)
                out[row, head] = np.float32(0.0)
            for block in range(first_block, end_block):
                low, high = max(first, block * block_size), min(end, (block + 1) * block_size)
                base = tables[table + block] * block_values + v_offset + kv_head * v_dim
                tile = memory[base + (low - block * block_size) * v_stride :]
                for group in range(groups):
                    line = scores[group, low - first : high - first]
                    _accumulate(line, tile, v_stride, out[row, kv_head * groups + group])


@functools.cache
def compile_attention() -> DecodeAttention:
    """Compile for this machine (seconds), or take what an earlier process left on disk.

    Compiled code goes to `__pycache__`, or to the user's cache directory if that is read-only; with
    neither to write to, nothing is kept.
    """
    options: dict[str, Any] = {"fastmath": _FAST, "error_model": "numpy", "nogil": True}
    try:
        compiled = numba.njit(cache=True, **options)(_decode_attention)
    except RuntimeError:  # "cannot cache function: no locator available"
        compiled = numba.njit(**options)(_decode_attention)
    floats, ints = np.zeros(8, dtype=np.float32), np.zeros(1, dtype=np.int64)
    heads = floats.reshape(1, 1, 8)
    sizes = (1, 1, 4, 4, 0, 0)
    compiled(
        heads[:, :, :4].copy(), floats, 8, 0, 4, sizes, ints, ints, ints, ints, 1.0, 0.0,
        floats[:0], heads[:, :, 4:].copy(),
    )  # fmt: skip
    result: DecodeAttention = compiled
    return result
