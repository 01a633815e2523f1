"""Every bad input has its refusal: field, limit and value seen, and never the prompt."""

from dataclasses import replace
from typing import Any

import pytest

from pdserve.domain.errors import BadRequest, Reason
from pdserve.domain.sampling import SamplingParams
from router.admission import (
    ServedModel,
    TextLimits,
    check_call,
    check_fit,
    check_label,
    check_num_tokens,
    check_token_values,
)
from router.requests import GenerateCall

MODEL = ServedModel(name="demo", max_context_tokens=100, max_kv_tokens=80, vocab_size=50)
LIMITS = TextLimits(max_prompt_chars=20)
GOOD = GenerateCall(prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=10), label="a")


def check(call: GenerateCall, limits: TextLimits = LIMITS) -> None:
    check_call(call, MODEL.name, limits)
    check_fit(call, MODEL, limits)
    if not isinstance(call.prompt, str):
        check_token_values(call.prompt, MODEL, field="token_ids")


def refusal(call: GenerateCall) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        check(call)
    return caught.value


def sampled(**changes: Any) -> GenerateCall:
    return replace(GOOD, sampling=replace(GOOD.sampling, **changes))


def test_good_calls_pass() -> None:
    check(GOOD)
    check(replace(GOOD, prompt="x" * 20, model="demo"))


@pytest.mark.parametrize(
    ("call", "field", "limit", "value"),
    [
        (replace(GOOD, prompt=""), "text", "at least 1 character", "got 0"),
        (replace(GOOD, prompt="x" * 21), "text", "at most 20 characters", "got 21"),
        (replace(GOOD, prompt=()), "token_ids", "at least 1 token", "got 0"),
        (replace(GOOD, prompt=(1, 50)), "token_ids[1]", "(50)", "got 50"),
        (replace(GOOD, prompt=(-1,)), "token_ids[0]", "(50)", "got -1"),
        (sampled(max_tokens=0), "sampling.max_tokens", "at least 1", "got 0"),
        (sampled(temperature=float("nan")), "sampling.temperature", "0 to 2", "got nan"),
        (sampled(temperature=2.5), "sampling.temperature", "0 to 2", "got 2.5"),
        (sampled(top_p=0.0), "sampling.top_p", "above 0", "got 0.0"),
        (sampled(stop=("a",) * 9), "sampling.stop", "at most 8", "got 9"),
        (sampled(stop=("a" * 65,)), "sampling.stop", "64 characters", "got [65]"),
        (sampled(stop_token_ids=(50,)), "sampling.stop_token_ids", "(50)", "got 50"),
        (sampled(logprobs=21), "sampling.logprobs", "0 to 20", "got 21"),
        (sampled(min_tokens=11), "sampling.min_tokens", "max_tokens (10)", "got 11"),
    ],
)
def test_invalid_field_names_field_limit_and_value(
    call: GenerateCall, field: str, limit: str, value: str
) -> None:
    error = refusal(call)
    assert error.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in error.violations] == [field]
    assert limit in error.violations[0].description
    assert value in error.violations[0].description


def test_unknown_model_lists_what_is_served_and_does_not_repeat_the_name() -> None:
    error = refusal(replace(GOOD, model="tell me a secret"))
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert "served: demo" in error.message
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "field", "limit", "value"),
    [
        (79, 3, "sampling.max_tokens", "80 tokens", "got 81"),
        (81, 1, "text", "80 tokens", "got 81"),
        (90, 11, "sampling.max_tokens", "100 tokens", "got 101"),
        (100, 1, "text", "100 tokens", "got 100"),
    ],
)
def test_answer_that_cannot_fit_is_refused_with_its_sum(
    num_prompt: int, max_tokens: int, field: str, limit: str, value: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        check_num_tokens(num_prompt, max_tokens, MODEL, field="text")
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    [violation] = caught.value.violations
    assert violation.field == field
    assert limit in violation.description
    assert value in violation.description


def test_answer_that_just_fits_passes() -> None:
    check_num_tokens(79, 2, MODEL, field="text")
    check_num_tokens(80, 1, MODEL, field="text")  # the last token needs no KV


def test_text_that_cannot_fit_however_it_is_tokenised_is_refused_before_that() -> None:
    limits = TextLimits(max_prompt_chars=10_000, max_chars_per_token=5)
    check(replace(GOOD, prompt="x" * 71 * 5), limits)  # 81 less the answer's 10
    with pytest.raises(BadRequest) as caught:
        check(replace(GOOD, prompt="x" * (71 * 5 + 1)), limits)
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    [violation] = caught.value.violations
    assert violation.field == "text"
    for part in ("at most 355 characters", "KV memory", "5 characters", "got 356"):
        assert part in violation.description
    check(replace(GOOD, prompt="x" * 10_000), replace(limits, max_chars_per_token=None))


def test_answer_that_leaves_no_room_for_a_prompt_is_refused_before_tokenising() -> None:
    error = refusal(replace(sampled(max_tokens=81), prompt="x"))
    assert error.reason is Reason.CONTEXT_TOO_LONG
    assert [violation.field for violation in error.violations] == ["sampling.max_tokens"]


@pytest.mark.parametrize("label", ["a" * 129, "a b", "a\nb", "ä", "\x00", "\x7f"])
def test_request_id_that_is_unsafe_in_logs_is_refused(label: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_label(label)
    assert caught.value.violations[0].field == "request_id"


def test_request_id_of_128_printable_characters_passes() -> None:
    check_label("!" * 64 + "~" * 64)
