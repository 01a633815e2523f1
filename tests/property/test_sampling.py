"""Draws that sort nothing are those of a full sort of the vocabulary."""

import math
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import SampleStep
from pdserve.engine.gumbel import gumbel_noise, random_words
from pdserve.engine.mixing import GOLDEN, mix, mix_ints
from pdserve.engine.nucleus import Work, draw_from_nucleus
from pdserve.engine.ranking import ranked, sample_places
from pdserve.engine.sampling import draw_tokens

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

SHAPES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "normal": lambda rng, size: rng.normal(0, 2, size),
    "steep": lambda rng, size: rng.normal(0, 60, size),
    "bfloat16": lambda rng, size: np.round(rng.normal(0, 3, size) * 8) / 8,
    "few values": lambda rng, size: rng.integers(0, 3, size).astype(float),
    "flat": lambda rng, size: np.full(size, 1.5),
    "nearly flat": lambda rng, size: rng.normal(0, 1e-5, size),
    "peak on a plain": lambda rng, size: (
        np.where(np.arange(size) == size // 2, 9.0, 0.0) + rng.normal(0, 1e-4, size)
    ),
    "two clusters": lambda rng, size: rng.normal(0, 0.1, size) - 6.0 * (np.arange(size) % 3 > 0),
    "few on a plateau": lambda rng, size: rng.normal(0, 0.1, size) - 6.0 * (np.arange(size) > 9),
    "falling": lambda rng, size: -np.log(np.arange(1, size + 1)),
    "misleading sample": lambda rng, size: (
        rng.normal(size=size) + 5 * np.isin(np.arange(size), sample_places(size))
    ),
    "ruled out": lambda rng, size: np.where(rng.random(size) < 0.9, -np.inf, rng.normal(size=size)),
    "huge": lambda rng, size: rng.normal(0, 1e37, size),
}


def logits_of(shape: str, size: int, seed: int) -> Logits:
    row = SHAPES[shape](np.random.default_rng(seed), size).astype(np.float32)
    if not np.isfinite(row).any():
        row[0] = 0
    result: Logits = row
    return result


def draw(row: Logits, params: SamplingParams, token_index: int) -> SampledToken:
    [drawn] = draw_tokens(row[None], [SampleStep(params=params, token_index=token_index)], ())
    assert isinstance(drawn, SampledToken)
    return drawn


def draw_by_sorting(row: Logits, params: SamplingParams, token_index: int) -> int | None:
    """The definition, in floating point: sort all, cut, add noise to all that is left.

    None if rounding would decide where to cut, as it does for equal probabilities.
    """
    order = np.argsort(-row.astype(np.float64), kind="stable")
    order = order[: params.top_k or len(order)]
    order = order[row[order] > -np.inf]
    scores = (row[order].astype(np.float64) - float(row.max())) / params.temperature
    probabilities = np.exp(scores) / np.exp(scores).sum()
    if params.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        if np.abs(before - params.top_p).min() < 1e-9:
            return None
        order, scores = order[before < params.top_p], scores[before < params.top_p]
    return int(order[(scores + gumbel_noise(params.seed, token_index, order)).argmax()])


def nucleus_by_sorting(scores: Floats, top_p: float) -> set[int]:
    """The definition, in whole numbers: the masses as documented, sorted and added one by one."""
    scale = 2.0 ** (52 - len(scores).bit_length())
    masses = [round(float(value)) for value in np.exp(scores) * scale]
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    limit = max(1, math.ceil(top_p * float(sum(masses))))
    sums = accumulate(masses[place] for place in order)
    num_kept = next(count for count, total in enumerate(sums, 1) if total >= limit)
    return set(order[:num_kept])


sizes = st.one_of(st.integers(1, 40), st.integers(1000, 6000))
top_ps = st.one_of(st.floats(1e-6, 1 - 1e-9), st.sampled_from([0.1, 0.5, 0.9, 1 - 2**-53]))
shapes = st.sampled_from(sorted(SHAPES))
seeds = st.integers(0, 2**32)


@given(shapes, sizes, seeds, top_ps, st.sampled_from([0.01, 0.3, 1.0, 2.0]))
@example("flat", 5000, 0, 0.1, 1.0)
@example("flat", 2, 0, 0.5, 1.0)  # the first token reaches it exactly
@example("few values", 5000, 0, 0.9999, 1.0)
@settings(max_examples=250, deadline=None)
def test_nucleus_is_that_of_a_full_sort(
    shape: str, size: int, seed: int, top_p: float, temperature: float
) -> None:
    row = logits_of(shape, size, seed).astype(np.float64)
    row = row[row > -np.inf]
    scores = np.maximum((row - row.max()) / temperature, -42.0)
    places = np.arange(len(scores))
    kept = np.array(sorted(nucleus_by_sorting(scores, top_p)))
    for token_index in range(20):
        noisy = scores[kept] + gumbel_noise(seed, token_index, kept)
        drawn = draw_from_nucleus(places, scores.copy(), top_p, seed, token_index, Work(size))
        assert drawn == kept[noisy.argmax()]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.lists(st.integers(0, 2**31)))
def test_random_words_are_a_stream_of_mixed_counters(
    seed: int, token_index: int, token_ids: list[int]
) -> None:
    ids = np.array(token_ids, dtype=np.intp)
    counters = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    words = random_words(seed, token_index, ids, np.empty(len(ids) + 3, dtype=np.uint64))
    assert words.tolist() == mix(counters + np.uint64(mix_ints(seed, token_index))).tolist()


@given(
    shapes,
    sizes,
    seeds,
    st.one_of(st.just(1.0), top_ps),
    st.one_of(st.just(0), st.integers(1, 7000)),
    st.sampled_from([1e-5, 0.3, 1.0, 2.0]),
    st.integers(0, 2**64 - 1),
)
@example("flat", 5000, 0, 1 - 2**-53, 0, 1.0, 7)
@settings(max_examples=400, deadline=None)
def test_draw_is_that_of_a_full_sort(
    shape: str, size: int, seed: int, top_p: float, top_k: int, temperature: float, noise_seed: int
) -> None:
    row = logits_of(shape, size, seed)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=noise_seed)
    for token_index in (0, 5):
        expected = draw_by_sorting(row, params, token_index)
        drawn = draw(row, params, token_index).token_id
        assert expected in (None, drawn)


@given(shapes, sizes, seeds, st.integers(0, 7000))
@example("flat", 5000, 0, 20)
@settings(max_examples=250, deadline=None)
def test_ranking_is_that_of_a_full_sort(shape: str, size: int, seed: int, count: int) -> None:
    row = logits_of(shape, size, seed)
    expected = sorted(range(size), key=lambda place: (-row[place], place))[:count]
    assert ranked(row, count).tolist() == expected


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_draws_of_a_large_vocabulary_are_those_of_a_full_sort(shape: str) -> None:
    row = logits_of(shape, 151_936, 1)
    for top_p in (0.01, 0.5, 0.9, 0.999, 1.0):
        for top_k in (0, 50, 9000, 100_000):
            params = SamplingParams(temperature=0.8, seed=4, top_p=top_p, top_k=top_k)
            assert draw_by_sorting(row, params, 3) in (None, draw(row, params, 3).token_id)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_ranking_of_a_large_vocabulary_is_that_of_a_full_sort(shape: str) -> None:
    row = logits_of(shape, 151_936, 2)
    expected = np.argsort(-row, kind="stable")
    for count in (1, 50, 100, 500, 9000, 100_000, 151_935):
        assert ranked(row, count).tolist() == expected[:count].tolist()
