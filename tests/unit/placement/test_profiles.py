"""Published profiles: what they say, and what is said when they do not."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients, StepShape
from placement.profiles import DistserveProfile, SplitwiseProfile, load_profile
from placement.simulation.timing import StepTiming, interpolate

COEFFICIENTS = StepCoefficients(
    fixed_s=0.01,
    prefill_token_s=1e-4,
    prefill_attention_s=2e-9,
    decode_token_s=3e-4,
    decode_context_token_s=4e-8,
)


def distserve() -> DistserveProfile:
    profile = load_profile("profiler-a100-80g.distserve.json")
    assert isinstance(profile, DistserveProfile)
    return profile


def splitwise() -> SplitwiseProfile:
    profile = load_profile("perf_model.csv")
    assert isinstance(profile, SplitwiseProfile)
    return profile


def test_distserve_profile_gives_coefficients_and_capacity() -> None:
    timing = distserve().timing("facebook/opt-13b", tp=2)
    assert timing.prefill[0] == pytest.approx(14.742973695171262)
    assert timing.threshold == 95
    assert distserve().timing("facebook/opt-13b", tp=1, pp=2).max_num_tokens == 163_008


def test_distserve_steps_in_the_general_form_take_the_same_time() -> None:
    timing = distserve().timing("facebook/opt-66b", tp=4)
    steps = timing.to_steps(128)
    a, b, c = timing.prefill
    for length in (1, 700, 2000):
        pairs = length * (length + 1) // 2
        prefill_s = interpolate(steps.prefill_tokens, steps.prefill_s, length)
        expected = (a + b * length + c * length**2) / 1e3
        assert prefill_s + steps.pair_s[0] * pairs == pytest.approx(expected)
    for size in (1, 94, 95, 128):
        a, b, c = timing.decode_small if size < 95 else timing.decode_large
        decode_s = steps.decode_s[size] + steps.context_s[size] * size * 500
        assert decode_s == pytest.approx((a + b * size * 501 + c * size) / 1e3)


def test_splitwise_profile_takes_medians_by_batch_tokens() -> None:
    timing = splitwise().timing("bloom-176b", hardware="A100")
    prompt_ms = interpolate(timing.tokens, timing.prompt_s, 2048) * 1e3
    assert prompt_ms == pytest.approx(536, abs=1)
    assert timing.memory_bytes - timing.weight_bytes == 8 * 85_899_345_920 - 329e9
    assert timing.kv_bytes_per_token == 4_014_080


def test_curves_go_on_outside_their_knots() -> None:
    knots, values = np.array([1.0, 2.0, 4.0]), np.array([10.0, 20.0, 30.0])
    assert [interpolate(knots, values, at) for at in (0, 1.5, 2, 6)] == [0.0, 15.0, 20.0, 40.0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: distserve().timing("facebook/opt-13b", tp=3), "tp 3; has 1, 2, 4"),
        (lambda: distserve().timing("opt-13b", tp=1), "did you mean facebook/opt-13b"),
        (lambda: distserve().timing("facebook/opt-66b", tp=2, pp=7), "KV capacity for tp 2 pp 7"),
        (lambda: splitwise().timing("bloom-176", hardware="h100"), "did you mean bloom-176b"),
        (lambda: splitwise().timing("bloom-176b", hardware="h200"), "h100-80gb"),
        (lambda: splitwise().timing("bloom-176b", hardware="h100", tp=4), "no tp 4; has 8"),
        (lambda: load_profile("perf_modell.csv"), "did you mean perf_model.csv"),
    ],
)
def test_what_a_profile_lacks_is_answered_with_what_it_has(ask: object, message: str) -> None:
    assert callable(ask)
    with pytest.raises(LocalFault, match=message):
        ask()


def test_own_profiles_are_read_from_their_path(tmp_path: Path) -> None:
    text = (
        "model,hardware,tensor_parallel,prompt_size,batch_size,prompt_time,token_time\n"
        "bloom-176b,h100-80gb,8,100,1,10,5\nbloom-176b,h100-80gb,8,100,2,30,7\n"
    )
    (tmp_path / "mine.csv.gz").write_bytes(gzip.compress(text.encode()))
    profile = load_profile("mine.csv.gz", folder=tmp_path)
    assert isinstance(profile, SplitwiseProfile)
    timing = profile.timing("bloom-176b", hardware="h100")
    assert timing.tokens.tolist() == [100.0, 200.0]
    assert timing.prompt_s.tolist() == [0.01, 0.03]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json:1: not JSON"),
        ("a.csv", "model,x\n", "no column hardware"),
        (
            "a.csv",
            "model,hardware,tensor_parallel,prompt_size,batch_size,prompt_time,token_time\n"
            "m,h,8,1,1,0,1\n",
            "a.csv:2: times must be positive",
        ),
    ],
)
def test_a_malformed_profile_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(LocalFault, match=message):
        load_profile(name, folder=tmp_path)


def test_coefficients_are_sampled_without_loss() -> None:
    exact = StepTiming.of_coefficients(COEFFICIENTS)
    sampled = StepTiming.of_model(COEFFICIENTS, max_num_requests=32)
    shape = StepShape.of([(300, 700)])
    for timing in (exact, sampled):
        prefill_s = interpolate(timing.prefill_tokens, timing.prefill_s, 700)
        pair_s = interpolate(timing.prefill_tokens, timing.pair_s, 700)
        assert prefill_s + pair_s * shape.num_prefill_pairs == pytest.approx(
            COEFFICIENTS.step_s(shape)
        )
    decode = StepShape(num_decodes=9, num_decode_context_tokens=9 * 700)
    assert sampled.decode_s[9] + sampled.context_s[9] * 9 * 700 == pytest.approx(
        COEFFICIENTS.step_s(decode)
    )
