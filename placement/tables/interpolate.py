"""Interpolation in log space: exact at measured points, proportional beyond them.

Kernel times span six decades over sizes that are powers of two, and between two sizes they
follow a power law, so straight lines are drawn between logarithms.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def log_interpolate(x: ArrayLike, knots: Array, log_values: Array) -> Array:
    """Values at `x` of a curve through (knots, exp(log_values)).

    Beyond the last knot the value grows in proportion; before the first it stays.
    """
    x = np.asarray(x, np.float64)
    value = np.exp(np.interp(np.log(np.maximum(x, 1e-12)), np.log(knots), log_values))
    scaled: Array = value * np.maximum(x / knots[-1], 1.0)
    return scaled


def cell(x: ArrayLike, log_knots: Array) -> tuple[NDArray[np.intp], Array]:
    """Lower knot and position (0..1) of each `x` between its two knots; clamped at the ends."""
    log_x = np.log(np.maximum(np.asarray(x, np.float64), 1e-12))
    if len(log_knots) == 1:
        return np.zeros(log_x.shape, np.intp), np.zeros_like(log_x)
    lower = np.clip(np.searchsorted(log_knots, log_x, side="right") - 1, 0, len(log_knots) - 2)
    span = log_knots[lower + 1] - log_knots[lower]
    return lower, np.clip((log_x - log_knots[lower]) / span, 0.0, 1.0)


def log_bilinear(x: ArrayLike, y: ArrayLike, axes: tuple[Array, Array], log_values: Array) -> Array:
    """Values at the points (x, y), broadcast together; clamped to the table's edges."""
    x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
    i, u = cell(x, np.log(axes[0]))
    j, v = cell(y, np.log(axes[1]))
    i2, j2 = np.minimum(i + 1, len(axes[0]) - 1), np.minimum(j + 1, len(axes[1]) - 1)
    low = log_values[i, j] * (1 - v) + log_values[i, j2] * v
    high = log_values[i2, j] * (1 - v) + log_values[i2, j2] * v
    value: Array = np.exp(low * (1 - u) + high * u)
    return value


def fill_corner(times: Array, batch: Array) -> Array:
    """Fill what was too large to measure: twice the batch at the same length takes twice as long.

    times: [batch, length] with NaN for missing points, batch ascending.
    """
    filled = times.copy()
    for row in range(1, len(batch)):
        missing = np.isnan(filled[row])
        filled[row, missing] = filled[row - 1, missing] * batch[row] / batch[row - 1]
    return filled
