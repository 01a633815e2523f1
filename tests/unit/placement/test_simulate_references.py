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
