"""Row operations in compiled Python, each one pass where torch takes several.

Rows are float32 and flat (see `numba_attention` for why indices are unsigned). Sums may be added up
in any order; nothing else differs from the plain formulas.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdserve.engine.numba_attention import compile_function, exp_negative

Floats = npt.NDArray[np.float32]


def _rms_norm(rows: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out = rows / sqrt(mean(rows^2) + eps) * weight; rows, out: [n, len(weight)], flat."""
    width = np.uint64(len(weight))
    for row in range(np.uint64(len(rows)) // width):
        base = row * width
        total = np.float32(0.0)
        for place in range(width):
            total += rows[base + place] * rows[base + place]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for place in range(width):
            out[base + place] = rows[base + place] * scale * weight[place]


def _sum_norm(
    rows: Floats, others: Floats, summed: Floats, normed: Floats, weight: Floats, eps: float
) -> None:
    """summed = rows + others; normed = `_rms_norm` of that; all but `weight` are flat."""
    width = np.uint64(len(weight))
    for row in range(np.uint64(len(rows)) // width):
        base = row * width
        total = np.float32(0.0)
        for place in range(width):
            value = rows[base + place] + others[base + place]
            summed[base + place] = value
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for place in range(width):
            normed[base + place] = summed[base + place] * scale * weight[place]


def _silu_times(joined: Floats, width: int, out: Floats) -> None:
    """out = silu(gate) * up; joined: [n, 2 * width], gate beside up; out: [n, width], flat."""
    size = np.uint64(width)
    one = np.float32(1.0)
    for row in range(np.uint64(len(out)) // size):
        gates, base = row * (size + size), row * size
        ups = gates + size
        for place in range(size):
            gate = joined[gates + place]
            power = exp_negative(-abs(gate))  # no overflow, whatever the sign
            top = one if gate >= 0 else power
            out[base + place] = gate * top / (one + power) * joined[ups + place]


def _rotate(
    source: Floats, stride: int, heads: int, cosines: Floats, sines: Floats, dim: int, out: Floats
) -> None:
    """Rotary embedding of halves: out = x * cos + rotate_half(x) * sin.

    source: rows `stride` values apart, each [heads, dim]; cosines, sines: [rows, dim]; out: [rows,
    heads, dim]; all flat.
    """
    size, half, step, count = (
        np.uint64(dim),
        np.uint64(dim // 2),
        np.uint64(stride),
        np.uint64(heads),
    )
    for row in range(np.uint64(len(cosines)) // size):
        angle = row * size
        for head in range(count):
            a, o = row * step + head * size, (row * count + head) * size
            for d in range(half):
                low, high = source[a + d], source[a + half + d]
                out[o + d] = low * cosines[angle + d] - high * sines[angle + d]
                out[o + half + d] = high * cosines[angle + half + d] + low * sines[angle + half + d]


def _turn(rows: Floats, stride: int, heads: int, cosines: Floats, sines: Floats, dim: int) -> None:
    """`_rotate` in place, of the first `heads` of each row."""
    size, half, step, count = (
        np.uint64(dim),
        np.uint64(dim // 2),
        np.uint64(stride),
        np.uint64(heads),
    )
    for row in range(np.uint64(len(cosines)) // size):
        c = row * size
        for head in range(count):
            a = row * step + head * size
            b = a + half
            for d in range(half):
                low, high = rows[a + d], rows[b + d]
                rows[a + d] = low * cosines[c + d] - high * sines[c + d]
                rows[b + d] = high * cosines[c + half + d] + low * sines[c + half + d]


@dataclass(frozen=True, slots=True)
class CompiledRows:
    """Parameters: see the functions above."""

    rms_norm: Callable[..., None]
    sum_norm: Callable[..., None]
    silu_times: Callable[..., None]
    rotate: Callable[..., None]
    turn: Callable[..., None]


@functools.cache
def compile_rows() -> CompiledRows:
    """Compile for this machine, or take what an earlier process left on disk."""
    rms_norm, silu_times = compile_function(_rms_norm), compile_function(_silu_times)
    rotate, turn = compile_function(_rotate), compile_function(_turn)
    sum_norm = compile_function(_sum_norm)
    floats = np.zeros(4, dtype=np.float32)
    rms_norm(floats, floats, 1.0, floats.copy())
    sum_norm(floats, floats, floats.copy(), floats.copy(), floats, 1.0)
    silu_times(floats, 2, floats[:2].copy())
    rotate(floats, 4, 1, floats, floats, 4, floats.copy())
    turn(floats.copy(), 4, 1, floats, floats, 4)
    return CompiledRows(rms_norm, sum_norm, silu_times, rotate, turn)
