"""Gumbel noise from a counter, and the token that wins by it."""

import numpy as np
import numpy.typing as npt

from pdserve.engine.mixing import GOLDEN, Words, mix, mix_ints
from pdserve.engine.ranking import Floats, Places

_NUM_BITS = 53
_NUM_PROBED = 256
_LOW = 6.0  # a score this far below the best one wins once in 400 times
MAX_NOISE_GAP = 42.0
"""No two noises differ by more: they lie between -log(54 log 2) and 53 log 2."""


def gumbel_noise(seed: int, token_index: int, token_ids: npt.NDArray[np.intp]) -> Floats:
    """Standard Gumbel noise for each token id: the SplitMix64 stream of (seed, index), at id."""
    return _noise(_random_bits(seed, token_index, token_ids))


def noisiest(scores: Floats, seed: int, token_index: int, token_ids: Places) -> int:
    """Where `scores + gumbel_noise` is largest; the noise of only a few tokens is computed.

    The sums of some tokens, the best one and those of the largest random numbers, bound the
    winner's from below. Whatever would need more noise than its random number gives to reach that
    bound has lost; most tokens are told by two scores, the best and one well below it.
    """
    bits = _random_bits(seed, token_index, token_ids)
    if len(bits) <= _NUM_PROBED:
        return int((scores + _noise(bits)).argmax())
    best = scores.argmax()
    lucky = np.flatnonzero(bits >= np.uint64((1 - _NUM_PROBED / len(bits)) * 2.0**_NUM_BITS))
    probed = np.append(lucky, best)
    bound = float((scores[probed] + _noise(bits[probed])).max())
    high = float(scores[best])
    is_rival = scores >= high - _LOW
    is_rival |= bits >= _least_bits(bound - (high - _LOW))
    is_rival &= bits >= _least_bits(bound - high)
    rivals = np.flatnonzero(is_rival)
    return int(rivals[(scores[rivals] + _noise(bits[rivals])).argmax()])


def _least_bits(noise: float) -> np.uint64:
    """The least random number that gives `noise`, less a margin for rounding."""
    return np.uint64(np.exp(-np.exp(-noise)) * (1 - 1e-9) * 2.0**_NUM_BITS)


def _random_bits(seed: int, token_index: int, token_ids: npt.NDArray[np.intp]) -> Words:
    words = token_ids.astype(np.uint64)
    words += np.uint64(1)
    words *= np.uint64(GOLDEN)
    words += np.uint64(mix_ints(seed, token_index))
    return mix(words) >> np.uint64(64 - _NUM_BITS)


def _noise(bits: Words) -> Floats:
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-_NUM_BITS
    noise: Floats = -np.log(-np.log(uniform))
    return noise
