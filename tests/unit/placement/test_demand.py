"""Reading, drawing and measuring workloads."""

import json
from pathlib import Path

import numpy as np
import pytest

from pdserve.client.workload import fit_to_context, read_trace
from pdserve.config.base import parse_settings
from pdserve.domain.errors import LocalFault
from placement.demand import ArrivalProcess, Lengths, SharedPrefix, Workload, WorkloadSpec
from placement.workload_files import format_workload, read_workload
from placement.workload_stats import describe, fit

SPEC = WorkloadSpec(
    num_requests=20_000,
    arrivals=ArrivalProcess(rate=5.0, cv=2.0),
    prompt_tokens=Lengths(distribution="lognormal", mean=1000, cv=1.2),
    output_tokens=Lengths(distribution="gamma", mean=200, cv=0.7),
)


def write(folder: Path, text: str, name: str = "w.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_our_csv_with_recorded_times(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n0.5,10,3\n0.5,20,0\n2,30,1\n")
    workload = read_workload(path)
    assert workload.prompt_tokens.tolist() == [10, 20, 30]
    assert workload.output_tokens.tolist() == [3, 0, 1]
    assert workload.trace().arrival_s.tolist() == [0.5, 0.5, 2.0]


def test_a_rate_scales_unit_gaps_and_keeps_their_sum(tmp_path: Path) -> None:
    path = write(tmp_path, "unit_interarrival,prompt_tokens,output_tokens\n0,1,1\n2,1,1\n1,1,1\n")
    workload = read_workload(path)
    assert workload.trace(4.0).arrival_s.tolist() == [0.0, 0.5, 0.75]
    with pytest.raises(LocalFault, match="rate"):
        workload.trace()


def test_a_rate_scales_recorded_times_to_that_mean() -> None:
    workload = Workload(
        prompt_tokens=np.ones(3, np.int64),
        output_tokens=np.ones(3, np.int64),
        arrival_s=np.array([10.0, 11.0, 14.0]),
    )
    assert workload.trace(2.0).arrival_s.tolist() == [0.0, 0.25, 1.0]


def test_requests_that_all_come_at_once_have_no_rate() -> None:
    ones = np.ones(3, np.int64)
    workload = Workload(prompt_tokens=ones, output_tokens=ones, arrival_s=np.zeros(3))
    with pytest.raises(LocalFault, match="all requests arrive at once"):
        workload.trace(2.0)


def test_azure_csv_starts_at_zero(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n",
    )
    workload = read_workload(path)
    assert workload.arrival_s == pytest.approx([0.0, 0.052])
    assert workload.prompt_tokens.tolist() == [4808, 3180]


def test_mooncake_spreads_its_coarse_stamps_and_keeps_prefix_blocks(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [7, 9]},
        {"timestamp": 0, "input_length": 600, "output_length": 6, "hash_ids": [7, 11]},
        {"timestamp": 3000, "input_length": 100, "output_length": 7, "hash_ids": [7]},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    workload = read_workload(write(tmp_path, text, "m.jsonl"))
    assert workload.arrival_s is not None
    assert workload.arrival_s.tolist() == [0.0, 1.5, 3.0]
    assert workload.prefix_starts is not None
    assert workload.prefix_ids is not None
    assert workload.prefix_starts.tolist() == [0, 2, 4, 5]
    assert workload.prefix_ids.tolist() == [0, 1, 0, 2, 0]
    stats = describe(workload)
    assert stats.prefix is not None
    assert stats.prefix.ideal_hit_share == pytest.approx((512 + 100) / 1700)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,5,5\n0.5,5,5\n", r"w\.csv:3: arrival_s: requests must be sorted by time"),
        ("1,5,5\n\n2,-5,5\n", r"w\.csv:4: prompt_tokens: expected a whole number, 1"),
        ("1,0,5\n", r"w\.csv:2: prompt_tokens: expected a whole number, 1 .* got '0'"),
        ("1,5,1.5\n", r"w\.csv:2: output_tokens: expected a whole number"),
        ("-1,5,5\n", r"w\.csv:2: arrival_s: expected a number, 0 or more; got '-1'"),
        ("nan,5,5\n", r"w\.csv:2: arrival_s: expected a number"),
        ("1,5\n", r"w\.csv:2: expected 3 cells, got 2"),
        ("", r"w\.csv:2: no requests in it"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, rows: str, message: str) -> None:
    path = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + rows)
    with pytest.raises(LocalFault, match=message):
        read_workload(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "w.csv:1: the file is empty"),
        ("a,b\n1,2\n", "w.csv:1: expected arrival_s or unit_interarrival.*got a, b"),
        ('{"arrival_s": 0, "prompt_tokens": 1\n', "w.csv:1: not JSON"),
    ],
)
def test_a_file_of_no_known_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LocalFault, match=message):
        read_workload(write(tmp_path, text))


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    drawn = SPEC.model_copy(
        update={"num_requests": 50, "prefix": SharedPrefix(share=0.5, tokens=1024, groups=3)}
    ).generate()
    again = read_workload(write(tmp_path, format_workload(drawn)))
    assert drawn.arrival_s is not None
    assert again.arrival_s is not None
    assert again.arrival_s.tolist() == drawn.arrival_s.tolist()
    assert again.prompt_tokens.tolist() == drawn.prompt_tokens.tolist()
    assert again.prefix_ids is not None
    assert drawn.prefix_ids is not None
    assert again.prefix_ids.tolist() == drawn.prefix_ids.tolist()


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    assert format_workload(SPEC.generate(3)) == format_workload(SPEC.generate(3))
    assert format_workload(SPEC.generate(3)) != format_workload(SPEC.generate(4))


def test_a_drawn_workload_has_the_asked_moments_and_fit_finds_them() -> None:
    stats = describe(SPEC.generate())
    assert stats.arrivals.rate == pytest.approx(5.0, rel=0.05)
    assert stats.arrivals.gap_cv == pytest.approx(2.0, rel=0.05)
    assert stats.prompt_tokens.cv == pytest.approx(1.2, rel=0.1)
    fitted = fit(SPEC.generate())
    assert fitted.prompt_tokens.distribution == "lognormal"
    assert fitted.output_tokens.distribution == "gamma"
    assert fitted.output_tokens.mean == pytest.approx(200, rel=0.03)
    assert fitted.arrivals.cv == pytest.approx(2.0, rel=0.05)


def test_a_diurnal_profile_moves_arrivals_and_keeps_the_mean_rate() -> None:
    process = ArrivalProcess(rate=10.0, cv=0.0, diurnal=(0.0, 3.0, 1.0), period_s=30.0)
    arrival_s = process.arrival_s(process.unit_gaps(3_000, np.random.default_rng(0)))
    counts, _ = np.histogram(arrival_s % 30.0, bins=[0, 10, 20, 30.001])
    assert counts[0] <= 11  # those that fall on the edges of the silent third
    assert counts[1] / counts[2] == pytest.approx(3.0, rel=0.02)
    assert arrival_s[-1] == pytest.approx(300.0, rel=0.01)


def test_a_shared_prefix_leaves_lengths_alone_and_is_shared() -> None:
    spec = SPEC.model_copy(
        update={"num_requests": 500, "prefix": SharedPrefix(share=1.0, tokens=2000, groups=2)}
    )
    workload = spec.generate()
    without = SPEC.model_copy(update={"num_requests": 500}).generate()
    assert workload.prompt_tokens.tolist() == without.prompt_tokens.tolist()
    stats = describe(workload)
    assert stats.prefix is not None
    assert stats.prefix.ideal_hit_share > 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cv": -1}, "cv"),
        ({"mean": 0}, "mean"),
        ({"min": 5, "max": 3}, "min \\(5\\) must not exceed max \\(3\\)"),
        ({"distributoin": "gamma"}, "did you mean distribution"),
    ],
)
def test_bad_lengths_are_explained(change: dict[str, object], message: str) -> None:
    with pytest.raises(LocalFault, match=message):
        parse_settings(Lengths, {"mean": 10, **change}, source="spec")


def test_lengths_of_a_trace_are_fitted_as_the_bench_does() -> None:
    fitted = read_workload(Path("azure-conv")).fitted(1024)
    sent = fit_to_context(read_trace("azure-conv"), 1024)
    assert fitted.prompt_tokens.tolist() == [request.prompt_tokens for request in sent]
    assert fitted.output_tokens.tolist() == [request.output_tokens for request in sent]
    assert int((fitted.prompt_tokens + fitted.output_tokens).max()) <= 1024


def test_prefix_blocks_shrink_with_the_prompts() -> None:
    workload = Workload(
        prompt_tokens=np.array([4096, 512]),
        output_tokens=np.array([1, 1]),
        unit_gaps=np.array([0.0, 1.0]),
        prefix_starts=np.array([0, 8, 9]),
        prefix_ids=np.array([0, 1, 2, 3, 4, 5, 6, 7, 0]),
    )
    assert workload.fitted(10_000).prefix_block_tokens == 512
    fitted = workload.fitted(513)
    assert fitted.prompt_tokens.tolist() == [512, 64]
    assert fitted.prefix_block_tokens == 64
