"""Gumbel noise from a counter, and the token that wins by it."""

import numpy as np
import numpy.typing as npt

from pdserve.engine.mixing import GOLDEN, Words, mix, mix_ints
from pdserve.engine.ranking import Floats, Places

_NUM_BITS = 53
MAX_NOISE_GAP = 42.0
"""No two noises differ by more: they lie between -log(54 log 2) and 53 log 2."""


def gumbel_noise(seed: int, token_index: int, token_ids: npt.NDArray[np.intp]) -> Floats:
    """Standard Gumbel noise for each token id: the SplitMix64 stream of (seed, index), at id."""
    return _noise(_random_bits(seed, token_index, token_ids))


def noisiest(scores: Floats, seed: int, token_index: int, token_ids: Places) -> int:
    """Where `scores + gumbel_noise` is largest; the noise of only a few tokens is computed.

    The sums of two tokens bound the winner's from below: those of the best score and of the
    largest random number. A token whose random number is too small to reach the bound with the
    best score has lost.
    """
    bits = _random_bits(seed, token_index, token_ids)
    best = scores.argmax()
    pair = np.array([best, bits.argmax()])
    least_noise = (scores[pair] + _noise(bits[pair])).max() - scores[best]
    least_uniform = np.exp(-np.exp(-least_noise)) * (1 - 1e-9)  # rounding never drops the winner
    rivals = np.flatnonzero(bits >= np.uint64(least_uniform * 2.0**_NUM_BITS))
    return int(rivals[(scores[rivals] + _noise(bits[rivals])).argmax()])


def _random_bits(seed: int, token_index: int, token_ids: npt.NDArray[np.intp]) -> Words:
    state = np.uint64(mix_ints(seed, token_index))
    with np.errstate(over="ignore"):
        words = mix(state + (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    return words >> np.uint64(64 - _NUM_BITS)


def _noise(bits: Words) -> Floats:
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-_NUM_BITS
    noise: Floats = -np.log(-np.log(uniform))
    return noise
