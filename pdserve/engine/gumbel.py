"""Gumbel noise from a counter, and the token that wins by it."""

import numpy as np
import numpy.typing as npt

from pdserve.engine.mixing import Words, mix_ints
from pdserve.engine.numba_draws import compile_draws
from pdserve.engine.ranking import Places

Floats = npt.NDArray[np.float64]

NUM_BITS = 53
_NUM_PROBED = 256
_LOW = 6.0  # a score this far below the best one wins once in 400 times
MAX_NOISE_GAP = 42.0
"""No two noises differ by more: they lie between -log(54 log 2) and 53 log 2."""


def gumbel_noise(seed: int, token_index: int, token_ids: Places) -> Floats:
    """Standard Gumbel noise for each token id: the SplitMix64 stream of (seed, index), at id."""
    return _noise(random_words(seed, token_index, token_ids, np.empty(len(token_ids), np.uint64)))


def random_words(seed: int, token_index: int, token_ids: Places, memory: Words) -> Words:
    """What the noise of the tokens is made of, at the beginning of `memory`."""
    words = memory[: len(token_ids)]
    compile_draws().mix_stream(np.uint64(mix_ints(seed, token_index)), token_ids, words)
    return words


def noisiest(scores: Floats, words: Words) -> int:
    """Where score and noise, which is made of the random `words`, add up to most.

    The noise of only a few tokens is computed. The sums of some tokens, the best one and those of
    the largest random numbers, bound the winner's from below. Whatever would need more noise than
    its random number gives to reach that bound has lost; most tokens are told by two scores, the
    best and one well below it.
    """
    if len(words) <= _NUM_PROBED:
        return int((scores + _noise(words)).argmax())
    best = scores.argmax()
    lucky = np.flatnonzero(words >= np.uint64((1 - _NUM_PROBED / len(words)) * 2.0**64))
    probed = np.append(lucky, best)
    bound = float((scores[probed] + _noise(words[probed])).max())
    high = float(scores[best])
    is_rival = scores >= high - _LOW
    is_rival |= words >= _least_word(bound - (high - _LOW))
    is_rival &= words >= _least_word(bound - high)
    rivals = np.flatnonzero(is_rival)
    return int(rivals[(scores[rivals] + _noise(words[rivals])).argmax()])


def _least_word(noise: float) -> np.uint64:
    """The least random number that gives `noise`, less a margin for rounding."""
    return np.uint64(np.exp(-np.exp(-noise)) * (1 - 1e-9) * 2.0**64)


def _noise(words: Words) -> Floats:
    uniform = ((words >> np.uint64(64 - NUM_BITS)).astype(np.float64) + 0.5) * 2.0**-NUM_BITS
    noise: Floats = -np.log(-np.log(uniform))
    return noise
