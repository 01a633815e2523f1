from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from pdserve.domain.errors import Reason
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.contract import Drawn, SampleStep
from pdserve.engine.gumbel import gumbel_noise
from pdserve.engine.sampling import draw_tokens

Logits = npt.NDArray[np.float32]
EOS = (0,)
HOT = SamplingParams(temperature=1.0, seed=11)


def logits_of(num_rows: int = 1, vocab_size: int = 50) -> Logits:
    rows = np.random.default_rng(3).normal(0, 2, (num_rows, vocab_size))
    return rows.astype(np.float32)


def draw_all(
    rows: Logits, params: Sequence[SamplingParams], index: int = 0, eos: Sequence[int] = EOS
) -> list[Drawn]:
    steps = [SampleStep(params=each, token_index=index) for each in params]
    return draw_tokens(rows, steps, eos)


def draw_token(row: Logits, params: SamplingParams, index: int = 0) -> SampledToken:
    [drawn] = draw_all(row[None], [params], index)
    assert isinstance(drawn, SampledToken)
    return drawn


def draw(row: Logits, params: SamplingParams, index: int = 0) -> int:
    return draw_token(row, params, index).token_id


def softmax(row: Logits) -> npt.NDArray[np.float64]:
    weights = np.exp(row.astype(np.float64) - row.max())
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result


def test_temperature_zero_takes_the_likeliest() -> None:
    rows = logits_of(4)
    expected = [SampledToken(token_id) for token_id in rows.argmax(axis=1).tolist()]
    assert draw_all(rows, [SamplingParams()] * 4) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    row = logits_of(vocab_size=12)[0] / 4  # no token so rare that chi square breaks down
    params = replace(HOT, temperature=temperature)
    num_draws = 6000
    counts = np.bincount([draw(row, params, index) for index in range(num_draws)], minlength=12)
    expected = softmax(row / np.float32(temperature)) * num_draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 31.3  # 0.1 % of correct samplers exceed this with 11 degrees of freedom


def test_seed_and_index_decide_the_draw() -> None:
    row = np.zeros(1000, dtype=np.float32)
    assert draw(row, HOT, 5) == draw(row, HOT, 5)
    assert len({draw(row, HOT, index) for index in range(20)}) > 15
    assert len({draw(row, replace(HOT, seed=seed)) for seed in range(20)}) > 15


def test_draw_does_not_depend_on_the_other_rows() -> None:
    rows = logits_of(6)
    params = [replace(HOT, seed=seed, top_p=0.9, top_k=20) for seed in range(6)]
    alone = [draw_token(row, each, 4) for row, each in zip(rows, params, strict=True)]
    assert draw_all(rows, params, 4) == alone


def test_draw_survives_the_rounding_that_batches_cause() -> None:
    rows = logits_of(40, 2000)
    nudged = rows + np.random.default_rng(4).normal(0, 1e-6, rows.shape).astype(np.float32)
    params = replace(HOT, top_p=0.95)
    assert [draw(row, params, 1) for row in rows] == [draw(row, params, 1) for row in nudged]


def test_top_k_draws_from_the_k_likeliest() -> None:
    row = logits_of()[0]
    likeliest = set(np.argsort(-row)[:3].tolist())
    assert {draw(row, replace(HOT, top_k=3), index) for index in range(300)} == likeliest


def test_top_p_draws_from_the_fewest_that_reach_p() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    for top_p, expected in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        drawn = {draw(row, replace(HOT, top_p=top_p), index) for index in range(300)}
        assert drawn == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_and_stop_tokens_are_masked_before_min_tokens(temperature: float) -> None:
    row = np.zeros(8, dtype=np.float32)
    row[[0, 5]] = 30
    row[2] = 15
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=(5,))
    assert draw(row, params, 1) == 2
    assert draw(row, params, 2) in (0, 5)


def test_logprobs_are_of_the_untempered_distribution() -> None:
    row = logits_of()[0]
    params = replace(HOT, temperature=0.3, logprobs=4, top_k=2)
    token = draw_token(row, params)
    expected = np.log(softmax(row))
    assert token.logprob == pytest.approx(expected[token.token_id])
    assert [other for other, _ in token.top_logprobs] == np.argsort(-row)[:4].tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(
        np.sort(-row * 0 + expected)[::-1][:4]
    )


def test_no_alternatives_are_reported_for_zero() -> None:
    token = draw_token(logits_of()[0], SamplingParams(logprobs=0))
    assert token.logprob is not None
    assert token.top_logprobs == ()


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(1, 2, np.arange(200_000))
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.04)


@pytest.mark.parametrize("params", [SamplingParams(), HOT, replace(HOT, top_p=0.5, top_k=3)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.nan])
@pytest.mark.parametrize("logprobs", [None, 3])
def test_row_that_is_not_finite_fails_alone(
    bad: float, logprobs: int | None, params: SamplingParams
) -> None:
    rows = logits_of(3)
    rows[1, 7] = bad
    params = replace(params, logprobs=logprobs)
    first, second, third = draw_all(rows, [params] * 3)
    assert [first, third] == [draw_token(rows[0], params), draw_token(rows[2], params)]
    assert isinstance(second, Failed)
    assert second.reason is Reason.UNUSABLE_LOGITS


def test_token_that_the_model_rules_out_is_neither_drawn_nor_listed() -> None:
    row = np.full(6, -np.inf, dtype=np.float32)
    row[[2, 4]] = 1.0
    for params in (SamplingParams(logprobs=5), replace(HOT, logprobs=5, top_p=0.99)):
        token = draw_token(row, params)
        assert token.token_id in (2, 4)
        assert [other for other, _ in token.top_logprobs] == [2, 4]
        assert [value for _, value in token.top_logprobs] == pytest.approx([-np.log(2)] * 2)


def test_row_without_an_allowed_token_fails() -> None:
    nothing = np.full((1, 4), -np.inf, dtype=np.float32)
    masked = np.array([[5, -np.inf, 5, -np.inf]], dtype=np.float32)
    params = SamplingParams(min_tokens=2, stop_token_ids=(2,))
    for rows in (nothing, masked):
        for each in (params, replace(params, temperature=0.7)):
            [drawn] = draw_all(rows, [each])
            assert isinstance(drawn, Failed)
            assert drawn.reason is Reason.UNUSABLE_LOGITS


def test_row_whose_drawing_raises_fails_alone() -> None:
    """An end token beyond the vocabulary: model files with one are refused, engines are not."""
    rows = logits_of(2)
    first, second = draw_all(rows, [SamplingParams(min_tokens=2), HOT], eos=(len(rows[0]) + 3,))
    assert isinstance(first, Failed)
    assert first.reason is Reason.INTERNAL
    assert second == draw_token(rows[1], HOT)


@pytest.mark.parametrize(
    "temperature", [5e-324, 1e-310, 2.3e-308, 1e-300, 1e-30, 1e-6, 9.9e-6, 1e-5, 1e-4]
)
@pytest.mark.parametrize("extra", [{}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 5, "top_p": 0.5}])
def test_tiny_temperature_takes_the_likeliest(temperature: float, extra: dict[str, float]) -> None:
    rows = np.concatenate([logits_of(8, 4000), logits_of(8, 4000) * 1e30])
    for row in rows:
        params = replace(HOT, temperature=temperature, **extra)  # type: ignore[arg-type]
        assert draw(row, params) == row.argmax()


def test_temperature_below_the_limit_is_greedy_among_equals() -> None:
    row = np.array([0, 3, 3, 3], dtype=np.float32)
    drawn = {draw(row, replace(HOT, temperature=9e-6), index) for index in range(20)}
    assert drawn == {1}


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 0.5, 2.0])
def test_huge_logits_overflow_nothing(temperature: float) -> None:
    row = np.array([-3e38, 1e38, 3.3e38, -1e38, 3.3e38], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        token = draw_token(row, replace(HOT, temperature=temperature, top_p=0.9, logprobs=5))
    assert token.token_id in (2, 4)
    assert all(np.isfinite(logprob) for _, logprob in token.top_logprobs)
    assert len(token.top_logprobs) == 5


@pytest.mark.parametrize("top_k", [50, 51, 2**31 - 1])
def test_top_k_of_the_vocabulary_or_more_leaves_every_token(top_k: int) -> None:
    row = logits_of()[0]
    for index in range(50):
        expected = draw(row, HOT, index)
        assert draw(row, replace(HOT, top_k=top_k), index) == expected


def test_smallest_top_p_takes_the_likeliest() -> None:
    row = logits_of()[0]
    assert draw(row, replace(HOT, top_p=5e-324)) == row.argmax()
