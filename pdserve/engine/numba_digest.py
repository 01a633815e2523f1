"""The sums of `pdserve.engine.digest` in compiled Python, in one pass over the words of a block."""

import functools
from collections.abc import Callable

import numpy as np

from pdserve.engine.mixing import FACTORS, GOLDEN, SHIFTS, Words
from pdserve.engine.numba_attention import compile_function

_GOLDEN = np.uint64(GOLDEN)
_FACTOR0, _FACTOR1 = np.uint64(FACTORS[0]), np.uint64(FACTORS[1])
_SHIFT0, _SHIFT1, _SHIFT2 = np.uint64(SHIFTS[0]), np.uint64(SHIFTS[1]), np.uint64(SHIFTS[2])
_HALF = np.uint64(32)


def _sum_words(words: Words, key: np.uint64, second_key: np.uint64, sums: Words) -> None:
    """sums += what `words`, the first of a block, add to both; see `pdserve.engine.digest`."""
    first, second, place = np.uint64(0), np.uint64(0), key
    for index in range(np.uint64(len(words))):
        place += _GOLDEN
        word = words[index] ^ place
        word = (word ^ (word >> _SHIFT0)) * _FACTOR0
        word = (word ^ (word >> _SHIFT1)) * _FACTOR1
        word ^= word >> _SHIFT2
        first += word
        word = (word ^ second_key) * _FACTOR0
        second += word ^ (word >> _HALF)
    sums[0] += first
    sums[1] += second


@functools.cache
def compile_digest() -> Callable[..., None]:
    """Compile for this machine, or take what an earlier process left on disk.

    Parameters: see `_sum_words`. `words` may be read-only; they are aligned.
    """
    compiled = compile_function(_sum_words)
    words, sums = np.zeros(1, dtype=np.uint64), np.zeros(2, dtype=np.uint64)
    compiled(words, _GOLDEN, _GOLDEN, sums)
    words.flags.writeable = False
    compiled(words, _GOLDEN, _GOLDEN, sums)
    return compiled
