from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep
from pdserve.engine.sampling import draw_tokens, gumbel_noise

Logits = npt.NDArray[np.float32]
EOS = (0,)
HOT = SamplingParams(temperature=1.0, seed=11)


def logits_of(num_rows: int = 1, vocab_size: int = 50) -> Logits:
    rows = np.random.default_rng(3).normal(0, 2, (num_rows, vocab_size))
    return rows.astype(np.float32)


def draw(row: Logits, params: SamplingParams, index: int = 0) -> int:
    return draw_tokens(row[None], [SampleStep(params=params, token_index=index)], EOS)[0].token_id


def softmax(row: Logits) -> npt.NDArray[np.float64]:
    weights = np.exp(row.astype(np.float64) - row.max())
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result


def test_temperature_zero_takes_the_likeliest() -> None:
    rows = logits_of(4)
    steps = [SampleStep(params=SamplingParams(), token_index=0)] * 4
    drawn = [token.token_id for token in draw_tokens(rows, steps, EOS)]
    assert drawn == rows.argmax(axis=1).tolist()


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
    steps = [SampleStep(params=each, token_index=4) for each in params]
    together = [token.token_id for token in draw_tokens(rows, steps, EOS)]
    assert together == [draw(row, each, 4) for row, each in zip(rows, params, strict=True)]


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
    [token] = draw_tokens(row[None], [SampleStep(params=params, token_index=0)], EOS)
    expected = np.log(softmax(row))
    assert token.logprob == pytest.approx(expected[token.token_id])
    assert [other for other, _ in token.top_logprobs] == np.argsort(-row)[:4].tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(
        np.sort(-row * 0 + expected)[::-1][:4]
    )


def test_no_alternatives_are_reported_for_zero() -> None:
    step = SampleStep(params=SamplingParams(logprobs=0), token_index=0)
    [token] = draw_tokens(logits_of(), [step], EOS)
    assert token.logprob is not None
    assert token.top_logprobs == ()


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(1, 2, np.arange(200_000))
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.04)
