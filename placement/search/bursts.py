"""How far arrivals run ahead of a rate: the bucket that a limit on the rate needs."""

import math

import numpy as np

from placement.simulation.trace import Floats

SPAN_S = 3600.0
"""Chance alone makes arrivals run ahead, further the longer one looks: as far as in an hour."""
NUM_DEVIATIONS = 4.0
MARGIN = 1.5
"""Other days of the same traffic than were simulated run further ahead."""
LEAST_BURST = 4


def burst_above(arrival_s: Floats, rate: float) -> int:
    """The smallest bucket, filled at `rate`, that refuses none of these arrivals.

    The most, over all stretches of them, of their number less what `rate` takes in that time.
    """
    if len(arrival_s) == 0:
        return 0
    ahead = np.arange(len(arrival_s)) - rate * arrival_s
    most = float(np.max(ahead - np.minimum.accumulate(ahead)))
    return 1 + math.ceil(most - 1e-9 * len(arrival_s))


def allowed_burst(simulated: int, *, rate: float, gap_cv: float) -> int:
    """Requests that may come at once where `simulated` did, and `rate` is the mean.

    The number that comes in a time varies with a standard deviation of cv * sqrt(mean).
    """
    by_chance = NUM_DEVIATIONS * max(gap_cv, 1.0) * math.sqrt(rate * SPAN_S)
    return math.ceil(max(MARGIN * simulated, by_chance)) + LEAST_BURST
