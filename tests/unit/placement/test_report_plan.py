"""`pdserve plan --report`: the page and the JSON of one answer are the same."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdserve.domain.errors import LocalFault
from placement.plan_inputs import parse_inputs
from placement.plan_report import add_curves, plan_curves, plan_page
from placement.plan_view import run_plan
from placement.report import read_report
from placement.search.results import PlanResult
from placement.solver import solve

INPUTS: dict[str, Any] = {
    "model": "facebook/opt-13b",
    "rules": "distserve",
    "latency": {"profile": "profiler-a100-80g.distserve.json"},
    "cluster": {"nodes": [{"gpu": "a100_sxm", "nodes": 1, "gpus_per_node": 3}]},
    "workload": {
        "prompt_tokens": {"mean": 250, "cv": 1.0, "max": 1500},
        "output_tokens": {"mean": 100, "cv": 0.8, "max": 400},
    },
    "slo": {"ttft_s": 0.2, "tpot_s": 0.1},
    "search": {"duration_s": 60, "seeds": 2, "tp": [1], "pp": [1], "colocated": False},
}


@cache
def answer() -> PlanResult:
    result = solve(parse_inputs(INPUTS, source="test"))
    assert isinstance(result, PlanResult)
    return result


def silent(stage: str, num_runs: int) -> None:
    pass


def test_command_writes_one_answer_twice(tmp_path: Path) -> None:
    inputs, page, text = (tmp_path / name for name in ("in.yaml", "r.html", "r.json"))
    inputs.write_text(yaml.safe_dump(INPUTS))
    code = run_plan(inputs, output=None, json_file=text, report=page, what_ifs=False)
    assert code == 0
    assert read_report(page.read_text()) == json.loads(text.read_text())


def test_report_that_cannot_be_written_is_told_before_planning(tmp_path: Path) -> None:
    inputs = tmp_path / "in.yaml"
    inputs.write_text(yaml.safe_dump(INPUTS))
    missing = tmp_path / "missing" / "r.html"
    with pytest.raises(LocalFault, match="missing"):
        run_plan(inputs, output=None, json_file=None, report=missing, what_ifs=False)


def test_page_shows_the_figures_of_the_json() -> None:
    inputs = parse_inputs(INPUTS, source="test")
    content = add_curves(inputs, answer(), answer().to_json())
    page = plan_page(content)
    head = page.split('<script type="application/json"')[0]
    seen, economy = content["prediction"], content["economy"]
    shown = (
        f"{seen['classes'][0]['attainment']:.1%}",
        f"{content['goodput']:.4g}",
        f"{economy['usd_per_hour']:,.2f}",
        f"{economy['usd_per_million_tokens']:.3f}",
        f"{economy['watts']:,.0f}",
        *(pool["gpu"] for pool in content["design"]["pools"]),
        *(rival["why_not"] for rival in content["neighbours"]),
        *(item["name"] for item in content["what_ifs"]),
    )
    for text in shown:
        assert f">{text}<" in head


def test_curves_belong_to_the_plan() -> None:
    curves = plan_curves(parse_inputs(INPUTS, source="test"), answer(), silent)
    rate = answer().prediction.rate
    assert curves.attainment is not None
    assert curves.attainment.planned_rate == rate
    at_plan = curves.attainment.rates.index(rate)
    # The prediction has more traces, the curve one longer trace: alike, not equal.
    shown = curves.attainment.classes[0].attainment[at_plan]
    assert shown == pytest.approx(answer().prediction.attainment, abs=0.05)
    [chosen] = [point for point in curves.trade_offs if point.is_chosen]
    assert chosen.label == answer().design.label
    costs = [point.usd_per_hour for point in curves.cost if point.usd_per_hour is not None]
    assert costs == sorted(costs)


def test_cells_add_up_in_rates_and_costs() -> None:
    inputs = parse_inputs(INPUTS, source="test")
    one = plan_curves(inputs, answer(), silent)
    four = plan_curves(inputs, replace(answer(), num_cells=4), silent)
    assert one.attainment is not None
    assert four.attainment is not None
    assert four.attainment.rates == tuple(4 * rate for rate in one.attainment.rates)
    assert four.attainment.classes == one.attainment.classes
    assert four.cost[0].usd_per_hour == pytest.approx(4 * (one.cost[0].usd_per_hour or 0))
    assert four.trade_offs[0].num_gpus == 4 * one.trade_offs[0].num_gpus
