"""The likeliest tokens of a row, found without sorting the vocabulary."""

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

_NUM_SORTED = 1024  # so few values are sorted rather than divided into slots
_NUM_SLOTS = 2048
_NUM_GROUPS = 2048


class Work:
    """Memory for the rows of a step, one row at a time.

    A megabyte for each intermediate result would be mapped and cleared anew each time, which takes
    as long as what is computed in it.
    """

    def __init__(self, size: int) -> None:
        self.scores, self.masses, self.depths = np.empty((3, size))
        self.slots = np.empty(size, dtype=np.intp)


def largest(values: Logits, count: int) -> Places:
    """Places of the `count` largest, in no order; of equals those of the lowest places."""
    if count == 0:
        return np.zeros(0, dtype=np.intp)
    if count >= len(values):
        return np.arange(len(values))
    places = np.flatnonzero(values >= _lower_bound(values, count))
    found = values[places]
    last = np.partition(found, -count)[-count]
    above, equal = np.flatnonzero(found > last), np.flatnonzero(found == last)
    return places[np.concatenate((above, equal[: count - len(above)]))]


def ranked(values: Logits, count: int) -> Places:
    """As `largest`, the largest first; of equals the lowest place first."""
    places = np.sort(largest(values, count))
    return places[np.argsort(-values[places], kind="stable")]


def _lower_bound(values: Logits, count: int) -> np.float32:
    """At most the `count`-th largest value, and close to it unless `count` is large.

    Each of `count` groups whose maxima are largest has a value that is not smaller.
    """
    size = len(values) // _NUM_GROUPS
    if size < 2 or 4 * count > _NUM_GROUPS:
        bound: np.float32 = np.partition(values, -count)[-count]
        return bound
    maxima = values[: size * _NUM_GROUPS].reshape(size, _NUM_GROUPS).max(axis=0)
    least: np.float32 = np.partition(maxima, -count)[-count]
    return least


def nucleus(scores: Floats, top_p: float, work: Work) -> Places:
    """The fewest likeliest tokens whose probabilities reach `top_p` (Holtzman et al., 2020).

    `scores` are at most 0, which one of them is; probabilities go with exp(score). Of equals the
    lowest place comes first. Probabilities are rounded to whole numbers whose sum stays below
    2**53, so that sums are exact and do not depend on the order of adding: a token that is less
    than 2**-36 times as likely as the likeliest one, of a vocabulary of 2**17, counts as none.
    """
    masses = np.exp(scores, out=work.masses[: len(scores)])
    masses *= 2.0 ** (52 - len(scores).bit_length())
    np.rint(masses, out=masses)
    limit = max(1.0, np.ceil(top_p * masses.sum()))
    if len(scores) <= _NUM_SORTED:
        order = np.argsort(-scores, kind="stable")
        return order[: _first_reaching(masses[order], limit) + 1]
    last, num_equals = _last_kept(scores, masses, limit, work)
    equals = np.flatnonzero(scores == last)
    if len(equals) == num_equals:
        return np.flatnonzero(scores >= last)
    return np.concatenate((np.flatnonzero(scores > last), equals[:num_equals]))


def _last_kept(scores: Floats, masses: Floats, limit: float, work: Work) -> tuple[float, int]:
    """The smallest score of the nucleus, and how many of its equals belong to it.

    Divides the scores by size into slots, goes on with the slot in which the masses reach
    `limit`, and sorts what is left once it is little.
    """
    while len(scores) > _NUM_SORTED:
        high, low = scores.max(), scores.min()
        if high == low:
            return float(high), int(np.ceil(limit / masses[0]))
        depths, slots = work.depths[: len(scores)], work.slots[: len(scores)]
        np.subtract(high, scores, out=depths)
        depths *= (_NUM_SLOTS - 1) / (high - low)
        np.copyto(slots, depths, casting="unsafe")  # cuts the fraction off
        sums = np.bincount(slots, masses, minlength=_NUM_SLOTS).astype(np.float64)
        slot = _first_reaching(sums, limit)
        limit -= float(sums[:slot].sum())
        members = np.flatnonzero(slots == slot)
        scores, masses = scores[members], masses[members]
    order = np.argsort(-scores, kind="stable")
    place = _first_reaching(masses[order], limit)
    last = scores[order[place]]
    return float(last), int((scores[order[: place + 1]] == last).sum())


def _first_reaching(masses: Floats, limit: float) -> int:
    """The first place up to which `masses` add up to `limit`, which all of them reach."""
    return int(np.searchsorted(np.cumsum(masses), limit))
