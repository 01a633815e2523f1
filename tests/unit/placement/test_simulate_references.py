"""Rules distserve and splitwise give what the published simulators gave."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.demand import Workload
from placement.simulate import simulate
from placement.simulation.settings import parse_config
from placement.simulation.summary import summarise
from placement.simulation.values import SimulationResult
from tests.reference import REFERENCE

DISTSERVE, SPLITWISE = REFERENCE / "distserve", REFERENCE / "splitwise"
CASES = {case["id"]: case for case in json.loads((DISTSERVE / "cases.json").read_text())}


def rows_of(path: Path) -> list[dict[str, str]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(text.decode().splitlines()))


def column(rows: list[dict[str, str]], name: str, kind: Any = float) -> Any:
    return np.array([kind(row[name]) for row in rows])


def run_distserve(case_id: str) -> tuple[dict[str, Any], SimulationResult]:
    case = CASES[case_id]
    rows = rows_of(DISTSERVE / f"{case['workload']}.csv")
    workload = Workload(
        prompt_tokens=column(rows, "prompt_len", int),
        output_tokens=column(rows, "output_len", int),
        unit_gaps=column(rows, "unit_interarrival"),
    )
    pools = [{"role": "prefill", "tp": case["tp_prefill"], "pp": case["pp_prefill"]}]
    if case["tp_decode"] is None:
        pools[0]["role"] = "colocated"
    else:
        pools.append({"role": "decode", "tp": case["tp_decode"], "pp": case["pp_decode"]})
    settings = {
        "rules": "distserve",
        "latency": {
            "profile": f"profiler-a100-80g.{case['backend']}.json",
            "model": case["model"],
        },
        "pools": pools,
        "slo": {
            "ttft_s": case["prefill_target_ms"] / 1e3,
            "tpot_s": case["decode_target_ms"] / 1e3,
        },
        "arrivals": {"rate": case["rate_rps"]},
    }
    config = parse_config(settings, source=case_id)
    result = simulate(config, workload)
    case["summary"] = summarise(config, result, workload.output_tokens)
    return case, result


@pytest.mark.parametrize("case_id", sorted(CASES))
def test_distserve_times_are_the_reference_s_to_a_millionth_of_a_millisecond(case_id: str) -> None:
    _, result = run_distserve(case_id)
    expected = rows_of(DISTSERVE / f"single_{case_id}_requests.csv")
    for name, values in (
        ("ttft_ms", result.ttft_s),
        ("tpot_ms", result.tpot_s),
        ("total_ms", result.e2e_s),
        ("arrival_ms", result.arrival_s),
    ):
        np.testing.assert_allclose(values * 1e3, column(expected, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case_id", sorted(CASES))
def test_distserve_attainment_and_percentiles_are_the_reference_s(case_id: str) -> None:
    case, _ = run_distserve(case_id)
    summary, expected = case["summary"], case["expected"]
    (slo,) = summary.classes
    assert slo.attainment_ttft * 100 == pytest.approx(expected["ttft_attain_pct"])
    assert slo.attainment_tpot * 100 == pytest.approx(expected["tpot_attain_pct"])
    assert slo.attainment * 100 == pytest.approx(expected["both_attain_pct"])
    assert summary.percentiles["ttft_s"]["p90"] * 1e3 == pytest.approx(expected["ttft_p90"])
    assert summary.percentiles["tpot_s"]["p99"] * 1e3 == pytest.approx(expected["tpot_p99"])
    assert summary.duration_s * 1e3 == pytest.approx(expected["sim_end_ms"])


def test_splitwise_times_and_machines_are_the_reference_s() -> None:
    rows = rows_of(SPLITWISE / "micro13.csv.gz")
    workload = Workload(
        prompt_tokens=column(rows, "prompt_size", int),
        output_tokens=column(rows, "token_size", int),
        arrival_s=column(rows, "arrival_timestamp"),
    )
    settings = {
        "rules": "splitwise",
        "latency": {"profile": "perf_model.csv", "model": "bloom-176b"},
        "pools": [
            {"role": "prefill", "replicas": 1, "gpu": "H100"},
            {"role": "decode", "replicas": 2, "gpu": "H100"},
        ],
    }
    result = simulate(parse_config(settings, source="micro13"), workload)
    expected = rows_of(SPLITWISE / "requests.csv.gz")
    for name, values in (
        ("ttft_s", result.ttft_s),
        ("tbt_s", result.tpot_s),
        ("e2e_s", result.e2e_s),
    ):
        np.testing.assert_allclose(values, column(expected, name), rtol=0, atol=1e-6)
    assert result.prefill.tolist() == [int(row["prompt_instance"][-1]) for row in expected]
    assert result.decode.tolist() == [int(row["token_instance"][-1]) for row in expected]


# Sums, weighted by request number so that order counts, of what a plain event loop with Python's
# heapq and lists gave for these clusters. Half-second stamps: many requests share a moment, and
# among these the published simulator's order is that of its heap.
HEAVY = [
    ("bloom-176b", "mixed_pool", (("h100", 2), ("a100", 2)), 0.12, 71809.9514988998, 654768.1040958675, 48065, 59718),  # noqa: E501
    ("llama2-70b", "mixed_pool", (("a100", 1), ("h100", 1)), 0.09, 297712.5255152815, 945420.0159658956, 26042, 26234),  # noqa: E501
    ("bloom-176b", "token_jsq", (("h100", 1), ("a100", 1)), 0.25, 168870.02030757873, 888778.7423532335, 15389, 15389),  # noqa: E501
    ("llama2-70b", "kv_jsq", (("h100", 2), ("h100-pcap", 1)), 0.08, 67663.5952268966, 270518.82174917345, 22214, 90300),  # noqa: E501
    ("bloom-176b", "kv_token_jsq", (("h100", 2), ("h100", 2)), 0.3, 146713.06833253196, 377853.06505763205, 0, 90300),  # noqa: E501
    ("bloom-176b", "mixed_pool", (("h100", 1), ("h100", 1)), 0.02, 1543058.4834859862, 2120859.94567555, 23482, 23518),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "scheduler", "machines", "gap_s", "ttft_sum", "e2e_sum", "prompt_sum", "token_sum"),
    HEAVY,
    ids=[f"{case[0]}-{case[1]}-{case[3]}" for case in HEAVY],
)
def test_splitwise_clusters_of_all_schedulers_equal_a_plain_event_loop(
    model: str,
    scheduler: str,
    machines: tuple[tuple[str, int], tuple[str, int]],
    gap_s: float,
    ttft_sum: float,
    e2e_sum: float,
    prompt_sum: int,
    token_sum: int,
) -> None:
    rng = np.random.default_rng(7)
    workload = Workload(
        arrival_s=np.round(np.cumsum(rng.exponential(gap_s, 300)) * 2) / 2 + 1,
        prompt_tokens=rng.integers(2, 4000, 300),
        output_tokens=rng.integers(2, 300, 300),
    )
    settings = {
        "rules": "splitwise",
        "latency": {"profile": "perf_model.csv", "model": model},
        "pools": [
            {"role": role, "gpu": gpu, "replicas": replicas}
            for role, (gpu, replicas) in zip(("prefill", "decode"), machines, strict=True)
        ],
        "splitwise": {"scheduler": scheduler},
    }
    result = simulate(parse_config(settings, source="heavy"), workload)
    weights = np.arange(1, 301)
    assert float((result.ttft_s * weights).sum()) == pytest.approx(ttft_sum, abs=1e-5)
    assert float((result.e2e_s * weights).sum()) == pytest.approx(e2e_sum, abs=1e-5)
    assert int((result.prefill * weights).sum()) == prompt_sum
    assert int((result.decode * weights).sum()) == token_sum
