"""A 64-bit mixing function: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Not cryptographic."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix(values: Words) -> Words:
    """Mix each word; equal words stay equal, all else looks random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return values ^ (values >> np.uint64(31))


def mix_ints(*values: int) -> int:
    """Hash non-negative integers, in this order, to 64 bits."""
    state = 0
    for value in values:
        state = (state * _FACTORS[0] + value + GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _FACTORS[0]) & _MASK
        state = ((state ^ (state >> 27)) * _FACTORS[1]) & _MASK
        state ^= state >> 31
    return state
