"""Each field of the sampling parameters has a limit, and the message names it."""

from dataclasses import replace
from typing import Any

import pytest

from pdserve.domain.errors import BadRequest
from pdserve.domain.sampling import SamplingParams, check_sampling


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"stop": ("x",) * 9}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x" * 65,)}, "stop"),
        ({"stop_token_ids": (100,)}, "stop_token_ids"),
        ({"stop_token_ids": (1,) * 65}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_value_beyond_its_limit_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest, match=rf"sampling\.{field}: .*; got ") as caught:
        check_sampling(SamplingParams(**changes), vocab_size=100)
    assert [violation.field for violation in caught.value.violations] == [f"sampling.{field}"]


@pytest.mark.parametrize("stop_token_ids", [(0, 1, 2, 3), (2, 3)])
def test_min_tokens_that_would_rule_out_every_token_are_refused(
    stop_token_ids: tuple[int, ...],
) -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=stop_token_ids)
    with pytest.raises(BadRequest, match=r"sampling\.min_tokens: .*vocabulary \(4\); got 1"):
        check_sampling(params, vocab_size=4, eos_token_ids=(0, 1))
    check_sampling(params, vocab_size=5, eos_token_ids=(0, 1))
    check_sampling(replace(params, min_tokens=0), vocab_size=4, eos_token_ids=(0, 1))


@pytest.mark.parametrize("temperature", [0.0, -0.0, 5e-324, 1e-310, 9.99e-6])
def test_temperatures_too_small_to_matter_are_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    check_sampling(params, vocab_size=4)
    assert params.is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy


def test_stop_strings_are_not_repeated_in_the_message() -> None:
    with pytest.raises(BadRequest) as caught:
        check_sampling(SamplingParams(stop=("secret" * 20,)), vocab_size=100)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=2.0, top_k=5, top_p=0.1, seed=2**64 - 1, logprobs=20),
        SamplingParams(max_tokens=1, min_tokens=1, stop=("x" * 64,) * 8, stop_token_ids=(99,)),
    ],
)
def test_limits_themselves_are_allowed(params: SamplingParams) -> None:
    check_sampling(params, vocab_size=100)
