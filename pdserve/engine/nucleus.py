"""The noisiest token of the nucleus, found without finding the nucleus.

The nucleus is the fewest likeliest tokens whose probabilities reach `top_p` (Holtzman et al.,
2020); of equals the lowest place comes first. So a token is in it if those before it do not reach
`top_p`, which one look at all of them tells, without a sort. The noisiest token of all is tried
first. If it is not in the nucleus, then neither is any that comes after it, and the noisiest of
those before it is tried. As noise draws tokens by their probability, each attempt halves on average
what is left outside the nucleus.
"""

import math

import numpy as np

from pdserve.engine.gumbel import Floats, noisiest, random_words
from pdserve.engine.numba_draws import compile_draws
from pdserve.engine.ranking import Places, sample_places

MASS_BITS = 52
"""The sum of a row's masses stays below two to this power, and a bit."""
_WORTHWHILE = 0.4  # to leave tokens out takes less time than it saves if no larger share remains


class Work:
    """Memory for the rows of a step, one row at a time.

    A megabyte for each intermediate result would be mapped and cleared anew each time, which takes
    as long as what is computed in it.
    """

    def __init__(self, size: int) -> None:
        self.places = np.arange(size)
        self.scores, self.masses, self.sifted = np.empty((3, size))
        self.words = np.empty(size, dtype=np.uint64)


def draw_from_nucleus(
    places: Places, scores: Floats, top_p: float, seed: int, token_index: int, work: Work
) -> int:
    """The noisiest place of the nucleus.

    `scores`: of `places`, which ascend; at most 0, which one of them is; they are overwritten.
    """
    sift = compile_draws().sift
    masses, sifted = weigh(scores, work.masses[: len(scores)]), work.sifted[: len(scores)]
    total = float(masses.sum())
    limit = max(1.0, math.ceil(top_p * total))
    guess = _guess(scores, masses, limit)
    if guess is not None and sift(guess, scores, masses, sifted) >= limit:
        is_left = sifted > -np.inf
    else:
        # Tokens that are lighter than the quotient weigh less than what lies outside the nucleus,
        # even if all are; 1 less, as rounding may give the likelier of two the smaller mass.
        is_left = masses >= (total - limit) / len(masses) - 1
    if np.count_nonzero(is_left) < _WORTHWHILE * len(scores):
        left = np.flatnonzero(is_left)
        places, scores, masses, sifted = places[left], scores[left], masses[left], sifted[left]
    words = random_words(seed, token_index, places, work.words)
    while True:
        winner = noisiest(scores, words)
        if sift(winner, scores, masses, sifted) < limit:
            return int(places[winner])
        scores, sifted = sifted, scores


def weigh(scores: Floats, memory: Floats) -> Floats:
    """Probabilities, which go with exp(score), as whole numbers; in `memory`.

    Their sum stays below 2**53, so that sums are exact and do not depend on the order of adding: a
    token that is less than 2**-36 times as likely as the likeliest one, of a vocabulary of 2**17,
    counts as none.
    """
    masses = np.exp(scores, out=memory)
    masses *= 2.0 ** (MASS_BITS - len(scores).bit_length())
    return np.rint(masses, out=masses)


def _guess(scores: Floats, masses: Floats, limit: float) -> int | None:
    """A place that comes after those of the nucleus, by a sample; None if too many come before."""
    sample = sample_places(len(scores))
    sample = sample[np.argsort(-scores[sample], kind="stable")]
    rank = int(np.searchsorted(np.cumsum(masses[sample]), limit * len(sample) / len(scores)))
    rank += 2 + 3 * math.isqrt(rank)
    return int(sample[rank]) if rank < _WORTHWHILE * len(sample) else None
