"""The likeliest tokens of a row, found without sorting the vocabulary."""

import math
from bisect import bisect_left

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Places = npt.NDArray[np.intp]

_SPREAD = np.sort(np.random.default_rng(0).random(1024))


def largest(values: Logits, count: int) -> Places:
    """Places of the `count` largest, in order of place; of equals those of the lowest places."""
    if count == 0:
        return np.zeros(0, dtype=np.intp)
    if count >= len(values):
        return np.arange(len(values))
    last = _nth_largest(values, count)
    places = np.flatnonzero(values >= last)
    if len(places) > count:
        is_kept = values[places] > last
        equals = np.flatnonzero(~is_kept)
        is_kept[equals[: count - len(places)]] = True  # all but the surplus ones at the end
        places = places[np.flatnonzero(is_kept)]
    return places


def ranked(values: Logits, count: int) -> Places:
    """As `largest`, the largest first; of equals the lowest place first."""
    places = largest(values, count)
    return places[np.argsort(-values[places], kind="stable")]


def sample_places(size: int) -> Places:
    """1,024 places that look random, but are always the same for one size; they ascend."""
    return (_SPREAD * size).astype(np.intp)


def _nth_largest(values: Logits, count: int) -> np.float32:
    """Two values of a sample enclose the one that is looked for (Floyd, Rivest, CACM 1975).

    Unlike `np.partition` this does not take 20 times as long if many values are -infinity.
    """
    if len(values) <= len(_SPREAD):
        result: np.float32 = np.sort(values)[-count]
        return result
    sample = np.sort(values[sample_places(len(values))])
    rank = len(sample) * (1 - count / len(values))
    margin = 2 + 3 * math.sqrt(min(rank, len(sample) - rank))
    first, end = max(0, int(rank - margin)), min(len(sample), int(rank + margin))
    if first >= len(sample) - 8:  # few are left above this, if it is low enough
        left = values[np.flatnonzero(values >= sample[first])]
        if count <= len(left) < len(values):
            return _nth_largest(left, count)
    place = bisect_left(
        sample, True, first, end, key=lambda pivot: bool(np.count_nonzero(values > pivot) < count)
    )
    if place == end:
        return _nth_largest(values[np.flatnonzero(values > sample[end - 1])], count)
    pivot: np.float32 = sample[place]
    num_from_pivot = int(np.count_nonzero(values >= pivot))
    if num_from_pivot >= count:
        return pivot
    is_left = values < pivot
    if place > first:
        is_left &= values > sample[place - 1]
    return _nth_largest(values[np.flatnonzero(is_left)], count - num_from_pivot)
