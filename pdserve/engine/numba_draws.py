"""Passes over the tokens of a vocabulary in compiled Python, each one where numpy takes several.

Sums may be added up in any order; those here are of whole numbers, so that it makes no difference.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdserve.engine.mixing import FACTORS, GOLDEN, SHIFTS, Words
from pdserve.engine.numba_attention import compile_function

Floats = npt.NDArray[np.float64]

_GOLDEN, _ONE = np.uint64(GOLDEN), np.uint64(1)
_FACTOR0, _FACTOR1 = np.uint64(FACTORS[0]), np.uint64(FACTORS[1])
_SHIFT0, _SHIFT1, _SHIFT2 = np.uint64(SHIFTS[0]), np.uint64(SHIFTS[1]), np.uint64(SHIFTS[2])


def _mix_stream(start: np.uint64, token_ids: npt.NDArray[np.intp], out: Words) -> None:
    """out = mix(start + (token_ids + 1) * GOLDEN): see `pdserve.engine.mixing`."""
    for place in range(len(token_ids)):
        word = start + (np.uint64(token_ids[place]) + _ONE) * _GOLDEN
        word = (word ^ (word >> _SHIFT0)) * _FACTOR0
        word = (word ^ (word >> _SHIFT1)) * _FACTOR1
        out[place] = word ^ (word >> _SHIFT2)


def _sift(place: int, scores: Floats, masses: Floats, out: Floats) -> float:
    """The mass of what comes before `place`: larger scores, and equal ones at lower places.

    out = the scores of those, -infinity for all others
    """
    score, mass = scores[place], 0.0
    for other in range(np.uint64(place)):
        is_before = scores[other] >= score
        mass += masses[other] if is_before else 0.0
        out[other] = scores[other] if is_before else -np.inf
    for other in range(np.uint64(place), np.uint64(len(scores))):
        is_before = scores[other] > score
        mass += masses[other] if is_before else 0.0
        out[other] = scores[other] if is_before else -np.inf
    return mass


@dataclass(frozen=True, slots=True)
class CompiledDraws:
    """Parameters: see `_mix_stream` and `_sift`."""

    mix_stream: Callable[..., None]
    sift: Callable[..., float]


@functools.cache
def compile_draws() -> CompiledDraws:
    """Compile for this machine, or take what an earlier process left on disk."""
    mix_stream, sift = compile_function(_mix_stream), compile_function(_sift)
    mix_stream(_ONE, np.zeros(1, dtype=np.intp), np.zeros(1, dtype=np.uint64))
    sift(0, np.zeros(1), np.zeros(1), np.zeros(1))
    return CompiledDraws(mix_stream, sift)
