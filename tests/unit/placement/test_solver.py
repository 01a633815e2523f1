"""The solver's answers, and its refusals."""

import json
import re

import pytest

from pdserve.domain.errors import LocalFault
from placement.plan_inputs import parse_inputs
from placement.search.problem import new_problem
from placement.search.results import NoPlan, PlanResult
from placement.solver import solve
from tests.support.exhaustive import all_designs, two_type_question
from tests.support.plan_inputs import small_inputs, two_type_inputs


def plan(**changes: object) -> PlanResult:
    result = solve(small_inputs(**changes))
    assert isinstance(result, PlanResult), result
    return result


def at_rate(rate: float, **workload: object) -> dict[str, object]:
    base = small_inputs().workload.model_dump(mode="json", exclude_none=True)
    return {**base, "rate": rate, **workload}


def test_plan_keeps_its_promise_and_no_neighbour_is_better() -> None:
    result = plan()
    assert result.prediction.is_kept
    assert result.prediction.attainment >= 0.9
    assert result.design.num_gpus <= 4
    assert result.neighbours
    assert not any(rival.is_better for rival in result.neighbours)
    low, high = result.goodput_interval
    assert low <= result.goodput <= high


def test_both_kinds_compete_and_the_verdict_names_the_loser() -> None:
    result = plan()
    other = "disaggregated" if result.design.kind == "colocated" else "colocated"
    assert any(rival.design.kind == other for rival in result.runner_ups)
    assert result.disaggregation.startswith(
        ("disaggregation", "colocated and", "disaggregated and")
    )


def test_best_of_the_other_kind_uses_every_gpu_type() -> None:
    result = solve(two_type_inputs())
    assert isinstance(result, PlanResult)
    is_colocated = result.design.kind == "colocated"
    rival = next(
        rival.design
        for rival in result.runner_ups
        if (rival.design.kind == "colocated") != is_colocated
    )
    assert {worker.gpu for worker, _ in rival.counts} == {"a100_sxm", "h100_sxm"}
    assert rival.num_gpus > 24  # nearly all of both types, not all of one


def test_plan_for_a_small_rate_is_as_small_in_a_large_cluster() -> None:
    sizes = []
    for nodes in (1, 64):  # of 64 nodes a cell has 8
        result = plan(
            objective={"goal": "gpus"},
            workload=at_rate(8.0),
            cluster={"nodes": [{"gpu": "a100_sxm", "nodes": nodes, "gpus_per_node": 8}]},
        )
        sizes.append(result.design.num_gpus * result.num_cells)
        totals = result.to_json()["totals"]
        assert totals["num_gpus"] == sizes[-1]
        assert totals["rate"] == pytest.approx(8.0)
    assert sizes[0] == sizes[1]


def test_rate_that_takes_every_cell_has_no_plan_beyond() -> None:
    result = solve(
        small_inputs(
            objective={"goal": "gpus"},
            workload=at_rate(100_000.0),
            cluster={"nodes": [{"gpu": "a100_sxm", "nodes": 16, "gpus_per_node": 8}]},
        )
    )
    assert isinstance(result, NoPlan)
    assert "this cluster of 128 GPUs" in result.reason


def test_kind_that_is_switched_off_is_not_searched() -> None:
    result = plan(search={"colocated": False})
    assert result.design.kind == "disaggregated"
    assert "not searched" in result.disaggregation


def test_answer_is_plain_json_and_the_same_twice() -> None:
    first, second = (json.dumps(plan().to_json(), allow_nan=False) for _ in range(2))
    assert first == second


def test_cheapest_plan_at_a_rate_holds_and_fewer_workers_do_not() -> None:
    result = plan(objective={"goal": "cost"}, workload=at_rate(4.0))
    assert result.prediction.is_kept
    assert result.prediction.rate == 4.0
    fewer = [r for r in result.neighbours if r.design.num_gpus < result.design.num_gpus]
    assert all(rival.goodput == 0.0 for rival in fewer)


def test_spare_worker_costs_more_and_survives_a_loss() -> None:
    plain = plan(objective={"goal": "gpus"}, workload=at_rate(2.0))
    spared = plan(objective={"goal": "gpus", "spare_workers": 1}, workload=at_rate(2.0))
    assert spared.design.num_gpus > plain.design.num_gpus
    for worker, _ in spared.design.counts:
        assert spared.design.with_change(worker, -1).is_complete


def test_rate_beyond_the_cluster_names_the_nearest_that_can() -> None:
    result = solve(small_inputs(objective={"goal": "cost"}, workload=at_rate(60.0)))
    assert isinstance(result, NoPlan)
    assert "beyond this cluster of 4 GPUs" in result.reason
    assert 0 < result.best_rate < 60
    assert any(line.startswith("rate:") for line in result.nearest)
    assert any(line.startswith("cluster:") for line in result.nearest)


@pytest.mark.parametrize(
    ("slo", "words"),
    [
        ({"ttft_s": 0.01, "tpot_s": 0.1}, "ttft_s 0.01 is below the floor"),
        ({"ttft_s": 1.0, "tpot_s": 0.001}, "tpot_s 0.001 is below the floor"),
    ],
)
def test_promise_below_physics_names_the_floor_and_what_sets_it(
    slo: dict[str, float], words: str
) -> None:
    with pytest.raises(LocalFault) as caught:
        solve(small_inputs(slo=slo))
    assert words in caught.value.message
    assert "a100_sxm TP" in caught.value.message


def test_unknown_gpu_gets_the_nearest_name() -> None:
    cluster = {"nodes": [{"gpu": "a100_smx", "nodes": 1}]}
    with pytest.raises(LocalFault, match="did you mean a100_sxm"):
        solve(small_inputs(cluster=cluster))


def test_model_that_fits_nowhere_is_refused_with_the_reason() -> None:
    inputs = small_inputs(
        model="Llama-3.1-70B",
        rules="pdserve",
        latency=None,
        cluster={"nodes": [{"gpu": "l4", "nodes": 1, "gpus_per_node": 2}]},
    )
    with pytest.raises(LocalFault, match="fits no worker of this cluster") as caught:
        solve(inputs)
    assert "GiB" in caught.value.message


def test_given_design_that_cannot_be_is_refused() -> None:
    design = [{"role": "prefill", "tp": 3}, {"role": "decode", "tp": 1}]
    with pytest.raises(LocalFault, match="no prefill worker TP3"):
        solve(small_inputs(design=design))


def test_given_design_is_judged_beside_the_plan() -> None:
    design = [{"role": "prefill", "tp": 2}, {"role": "decode", "tp": 2}]
    result = plan(design=design)
    assert result.judged is not None
    assert result.judged.design.label == "1 prefill TP2 + 1 decode TP2"
    value = result.judged.goodput / result.judged.design.num_gpus
    assert result.goodput / result.design.num_gpus >= value * 0.98


def test_classes_are_kept_one_by_one() -> None:
    classes = [
        {"name": "chat", "ttft_s": 0.25, "tpot_s": 0.08, "share": 0.7},
        {"name": "bulk", "ttft_s": 2.0, "tpot_s": 0.2, "attainment": 0.99, "share": 0.3},
    ]
    result = plan(slo=classes)
    assert [item.name for item in result.prediction.classes] == ["chat", "bulk"]
    assert result.prediction.margin >= 0


def test_one_gpu_more_at_a_rate_is_told_as_the_rate_that_it_allows() -> None:
    result = plan(objective={"goal": "gpus"}, workload=at_rate(2.0))
    words = re.fullmatch(
        r"the plan goes up to (\S+) requests/s; with 1 .* more \(\d+ GPUs?, .* USD/h\) up to (\S+)",
        result.one_gpu_more,
    )
    assert words is not None, result.one_gpu_more
    assert 2.0 * 0.95 <= float(words[1]) <= float(words[2])


def test_interval_of_a_single_trace_comes_from_its_requests() -> None:
    result = plan(search={"seeds": 1})
    low, high = result.prediction.interval
    assert result.prediction.attainment - 0.3 < low < result.prediction.attainment < high
    assert result.prediction.classes[0].interval == (low, high)


def test_clusters_of_few_gpus_of_two_types_are_looked_at_in_every_mixture() -> None:
    problem = new_problem(parse_inputs(two_type_question(501), source="two types"))
    every = set(all_designs(problem))
    # The limit counts those that cannot serve, too.
    assert set(problem.space.mixtures(2 * len(every) + 100)) == every
    some = problem.space.mixtures(150)
    assert 0 < len(some) < 150
    cuts = {(worker.role, worker.gpu, worker.cut) for d in some for worker, _ in d.counts}
    assert len(cuts) == len({(role, gpu) for role, gpu, _ in cuts})
    assert problem.space.mixtures(3) == []


def test_requests_beyond_the_models_context_are_noted() -> None:
    changes = {"rules": "pdserve", "latency": None, "slo": {"ttft_s": 2.0, "tpot_s": 0.1}}
    assert not any("context" in note for note in plan(**changes).notes)
    lengths = {"prompt_tokens": {"mean": 900, "cv": 0.6, "max": 4000}}
    outputs = {"output_tokens": {"mean": 50, "cv": 0.6, "max": 600}}
    notes = plan(**changes, workload={**lengths, **outputs}).notes
    assert any("longer than the model's context of 2048 tokens" in note for note in notes)


def test_cuts_that_no_node_holds_are_named_with_the_nodes() -> None:
    with pytest.raises(LocalFault, match=r"no cut of search.tp and .* fits 4 a100_sxm, 4 a node"):
        solve(small_inputs(search={"tp": [8]}))


def test_profile_that_knows_no_gpu_types_is_noted_in_a_cluster_of_two() -> None:
    nodes = [{"gpu": gpu, "nodes": 1, "gpus_per_node": 2} for gpu in ("a100_sxm", "h100_sxm")]
    notes = plan(cluster={"nodes": nodes}).notes
    assert "the profile's step times are taken for every GPU type" in notes
    assert not any("every GPU type" in note for note in plan().notes)
