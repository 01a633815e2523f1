"""The step time model fitted to points, and the file that keeps it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients, StepShape
from placement.fitted_profile import (
    FittedProfile,
    Handoff,
    Limits,
    Serving,
    simulation_yaml,
    to_json,
    write_profile,
)
from placement.fitting import (
    StepPoint,
    compare,
    error_summary,
    fit_link,
    fit_non_negative,
    fit_phase,
    fit_typical,
)
from placement.profiles import DistserveProfile, load_fitted, load_profile
from placement.simulation.settings import parse_config
from placement.simulation.timing import StepTiming

TRUE = StepCoefficients(
    fixed_s=2e-3,
    prefill_token_s=5e-5,
    prefill_attention_s=4e-8,
    decode_token_s=1e-4,
    decode_context_token_s=5e-7,
)
PROFILE = FittedProfile(
    model="demo",
    prefill=replace(TRUE, decode_token_s=0.0, decode_context_token_s=0.0, relative_error=0.05),
    decode=replace(TRUE, prefill_token_s=0.0, prefill_attention_s=0.0, relative_error=0.02),
    handoff=Handoff(handoff_s=0.004, link_latency_s=0.006, link_bytes_per_s=1e9),
    limits=Limits(
        prefill_kv_tokens=8192,
        decode_kv_tokens=16384,
        kv_bytes_per_token=2048.0,
        block_size=16,
        max_step_tokens=512,
        max_num_requests=64,
    ),
)


def prompts(*lengths: int) -> list[StepPoint]:
    return [point("prefill", StepShape.of([(0, length)])) for length in lengths]


def answers(*batches: tuple[int, int]) -> list[StepPoint]:
    return [point("decode", StepShape.of((), [context] * size)) for size, context in batches]


def point(phase: str, shape: StepShape, num_steps: int = 1, factor: float = 1.0) -> StepPoint:
    measured_s = factor * (TRUE.step_s(shape) + (num_steps - 1) * TRUE.fixed_s)
    assert phase in ("prefill", "decode")
    return StepPoint(
        phase="prefill" if phase == "prefill" else "decode",
        label=f"{shape}",
        shape=shape,
        num_steps=num_steps,
        measured_s=measured_s,
    )


def test_exact_points_give_the_coefficients_back() -> None:
    points = prompts(64, 256, 512) + answers((1, 100), (8, 100), (8, 600))
    points.append(point("prefill", StepShape.of([(0, 1024)]), num_steps=2))
    prefill, decode = fit_phase(points, "prefill"), fit_phase(points, "decode")
    for name in ("fixed_s", "prefill_token_s", "prefill_attention_s"):
        assert getattr(prefill, name) == pytest.approx(getattr(TRUE, name))
    for name in ("fixed_s", "decode_token_s", "decode_context_token_s"):
        assert getattr(decode, name) == pytest.approx(getattr(TRUE, name))
    assert prefill.relative_error == pytest.approx(0.0, abs=1e-9)


def test_no_coefficient_is_negative() -> None:
    points = [
        StepPoint(phase="decode", label="", shape=shape, measured_s=measured_s)
        for shape, measured_s in (
            (StepShape.of((), [100]), 0.003),
            (StepShape.of((), [100] * 8), 0.004),
            (StepShape.of((), [600]), 0.002),  # faster with more context: nothing real does that
        )
    ]
    fitted = fit_phase(points, "decode")
    assert fitted.decode_context_token_s == 0.0
    assert fitted.fixed_s > 0.0


def test_a_pause_of_the_machine_moves_no_typical_time() -> None:
    terms = np.column_stack([np.ones(100), np.arange(100.0)])
    target = 3.0 + 0.5 * np.arange(100.0)
    paused = target.copy()
    paused[::10] *= 4  # every tenth row is far too late
    assert fit_typical(terms, paused) == pytest.approx([3.0, 0.5], rel=0.05)
    assert fit_non_negative(terms, paused)[1] > 0.6  # what least squares would make of it


def test_a_typical_term_is_never_negative() -> None:
    terms = np.column_stack([np.ones(20), np.arange(20.0)])
    assert fit_typical(terms, 5.0 - 0.1 * np.arange(20.0)) == pytest.approx([4.05, 0.0], abs=0.2)


def test_a_phase_without_points_is_an_error() -> None:
    with pytest.raises(LocalFault, match="no decode step"):
        fit_phase(prompts(64), "decode")


def test_residuals_stand_beside_what_workers_reported() -> None:
    points = [point("decode", StepShape.of((), [100]), factor=1.25)]
    [residual] = compare(
        points, {"prefill": TRUE, "decode": TRUE}, {"prefill": TRUE, "decode": PROFILE.decode}
    )
    assert residual.error == pytest.approx(1 / 1.25 - 1)
    assert residual.reported_error == pytest.approx(1 / 1.25 - 1)


def test_errors_are_summarised_without_their_sign() -> None:
    assert error_summary([-0.1, 0.1, 0.3]) == pytest.approx((0.1, 0.26))


def test_link_is_found_under_one_late_answer() -> None:
    step_s, handoff_s = 0.003, 0.004
    gaps = [(n, 0.002 + 1e-6 * n + step_s - handoff_s) for n in (100, 200, 300, 400, 500)]
    gaps.append((300, 0.5))
    latency_s, token_s = fit_link(gaps, handoff_s, step_s)
    assert latency_s == pytest.approx(0.002, rel=0.05)
    assert token_s == pytest.approx(1e-6, rel=0.05)


def test_file_round_trips(tmp_path: Path) -> None:
    write_profile(PROFILE, tmp_path / "p.json")
    assert load_fitted(str(tmp_path / "p.json"), "demo") == PROFILE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"demo": [1, 2, 3]}', "expected coefficients"),
        ('{"demo": {"1": {"pdserve": {"form": 9}}}}', "form 9"),
        ('{"demo": {"1": {"pdserve": {"form": 3}}}}', "damaged"),
    ],
)
def test_other_files_are_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(LocalFault, match=message):
        load_fitted(str(tmp_path / "p.json"), "demo")


def test_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match="No such file"):
        write_profile(PROFILE, tmp_path / "missing" / "p.json")


def test_simulator_reads_the_same_step_times(tmp_path: Path) -> None:
    """DistServe's form holds the fit exactly; pools made from the profile agree with it."""
    write_profile(PROFILE, tmp_path / "p.json")
    loaded = load_profile("p.json", folder=tmp_path)
    assert isinstance(loaded, DistserveProfile)
    steps = loaded.timing("demo", tp=1, max_num_tokens=1).to_steps(64)
    own = StepTiming.of_coefficients(PROFILE.decode)
    assert steps.decode_s[:3] == pytest.approx(
        [PROFILE.decode.step_s(StepShape(num_decodes=size)) for size in range(3)]
    )
    assert steps.context_s[1] == pytest.approx(own.context_s[1])
    prompt = StepShape.of([(0, 300)])
    read_s = steps.prefill_s[0] + 300 * (steps.prefill_s[1] - steps.prefill_s[0])
    read_s += prompt.num_prefill_pairs * steps.pair_s[0]
    assert read_s == pytest.approx(PROFILE.prefill.step_s(prompt))


def test_written_configuration_is_one_that_simulate_accepts(tmp_path: Path) -> None:
    write_profile(PROFILE, tmp_path / "p.json")
    config = parse_config(
        yaml.safe_load(simulation_yaml(PROFILE, "p.json")), source="sim.yaml", folder=tmp_path
    )
    assert [pool.kv_tokens for pool in config.pools] == [8192, 16384]
    assert config.pdserve == PROFILE.options()


def test_pools_carry_link_and_memory() -> None:
    prefill, decode = PROFILE.pools(num_prefill=2, num_decode=3)
    assert (prefill.replicas, decode.replicas) == (2, 3)
    assert prefill.link.latency_s == PROFILE.handoff.link_latency_s
    assert decode.kv_tokens == PROFILE.limits.decode_kv_tokens


def test_steps_of_a_serving_cluster_are_those_that_are_simulated() -> None:
    serving = Serving(
        prefill=1.2,
        decode=1.5,
        beside_prefill=1.4,
        beside_answer=0.1,
        beside_decode=1.3,
        stolen_s=0.003,
        wake_s=0.001,
        busy_handoff_s=0.002,
    )
    profile = replace(PROFILE, serving=serving)
    prompt, four = StepShape.of([(0, 300)]), StepShape.of((), [260] * 4)
    assert profile.coefficients("prefill").step_s(prompt) == pytest.approx(
        1.2 * PROFILE.prefill.step_s(prompt)
    )
    assert profile.coefficients("decode").step_s(four) == pytest.approx(
        1.5 * PROFILE.decode.step_s(four)
    )
    prefill, decode = profile.pools(num_prefill=1, num_decode=1)
    assert (prefill.beside, prefill.beside_answer, prefill.stolen_s) == (1.4, 0.1, 0.0)
    assert (decode.beside, decode.beside_answer) == (1.3, 0.0)
    assert (decode.stolen_s, decode.wake_s) == (0.003, 0.001)
    assert profile.options().busy_handoff_s == 0.002
    loaded = to_json(profile)["demo"]["1"]
    assert loaded["prefill"][0] == pytest.approx(1.2e3 * PROFILE.prefill.fixed_s)


def test_json_holds_no_numbers_that_json_lacks() -> None:
    json.dumps(to_json(PROFILE), allow_nan=False)
