"""A 64-bit mixing function: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Not cryptographic."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
SHIFTS = (30, 27, 31)
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def mix(values: Words) -> Words:
    """Mix each word; equal words stay equal, all else looks random."""
    values = (values ^ (values >> np.uint64(SHIFTS[0]))) * np.uint64(FACTORS[0])
    values = (values ^ (values >> np.uint64(SHIFTS[1]))) * np.uint64(FACTORS[1])
    return values ^ (values >> np.uint64(SHIFTS[2]))


def mix_ints(*values: int) -> int:
    """Hash non-negative integers, in this order, to 64 bits."""
    state = 0
    for value in values:
        state = (state * FACTORS[0] + value + GOLDEN) & _MASK
        state = ((state ^ (state >> SHIFTS[0])) * FACTORS[0]) & _MASK
        state = ((state ^ (state >> SHIFTS[1])) * FACTORS[1]) & _MASK
        state ^= state >> SHIFTS[2]
    return state
