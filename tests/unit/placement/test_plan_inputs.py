"""Inputs of a plan: every mistake is named with what would be right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pdserve.domain.errors import LocalFault
from placement.plan_inputs import EXAMPLE, PlanInputs, parse_inputs
from placement.plan_view import _located


def inputs(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "model": "facebook/opt-13b",
        "rules": "distserve",
        "latency": {"profile": "profiler-a100-80g.distserve.json"},
        "cluster": {"nodes": [{"gpu": "a100_sxm", "nodes": 1, "gpus_per_node": 4}]},
        "workload": {
            "prompt_tokens": {"mean": 400, "cv": 0.5, "max": 1500},
            "output_tokens": {"mean": 100, "cv": 0.5, "max": 500},
        },
        "slo": {"ttft_s": 0.2, "tpot_s": 0.1},
    }
    return {**data, **changes}


def fault(**changes: Any) -> str:
    with pytest.raises(LocalFault) as caught:
        parse_inputs(inputs(**changes), source="in.yaml")
    return caught.value.message


def test_example_is_valid_and_shows_every_field() -> None:
    parsed = parse_inputs(yaml.safe_load(EXAMPLE), source="example")
    assert parsed.objective.goal == "cost"
    for part in (parsed.search, parsed.objective, parsed.cluster, parsed.workload):
        for name in type(part).model_fields:
            assert name in EXAMPLE, name


def test_latency_takes_the_model_of_the_inputs() -> None:
    parsed = parse_inputs(inputs(), source="in.yaml")
    assert parsed.latency is not None
    assert parsed.latency.model == "facebook/opt-13b"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"gaol": "cost"}}, "did you mean goal"),
        ({"search": {"sedes": 3}}, "did you mean seed"),
        ({"objective": {"goal": "cost"}}, "needs workload.rate"),
        ({"slo": []}, "at least one class"),
        ({"slo": {"ttft_s": -1, "tpot_s": 0.1}}, "ttft_s"),
        ({"workload": {}}, "give trace, or both"),
        ({"cluster": {"nodes": []}}, "cluster"),
        ({"cluster": {"nodes": [{"gpu": "a100_sxm", "node": 4}]}}, "did you mean nodes"),
        ({"search": {"disaggregated": False, "colocated": False}}, "nothing is left"),
        ({"latency": {"profile": None}, "rules": "distserve"}, "need latency.profile"),
        ({"slo": "splitwise"}, "needs rules: splitwise"),
    ],
)
def test_mistake_is_named(changes: dict[str, Any], words: str) -> None:
    assert words in fault(**changes)


def test_diurnal_profile_is_planned_for_its_peak() -> None:
    workload = {**inputs()["workload"], "rate": 10.0, "diurnal": [0.5, 1.0, 1.5]}
    assert parse_inputs(inputs(workload=workload), source="x").workload.peak_rate == 15.0


def test_names_in_a_file_are_relative_to_it_and_packaged_traces_are_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def located(trace: str) -> PlanInputs:
        data = inputs(model="config.json", workload={"trace": trace})
        return _located(parse_inputs(data, source="in.yaml"), tmp_path / "in.yaml")

    assert located("azure-code").workload.trace == "azure-code"
    assert located("t.csv").workload.trace == str(tmp_path / "t.csv")
    assert located("t.csv").model == str(tmp_path / "config.json")
