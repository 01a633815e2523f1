"""What-ifs of a plan."""

import re

from placement.search.choose import choose, new_evaluator
from placement.search.problem import new_problem
from placement.search.results import PlanResult
from placement.search.what_if import Questions
from placement.solver import solve
from tests.support.plan_inputs import small_inputs


def asked() -> PlanResult:
    result = solve(small_inputs(search={"what_ifs": True, "colocated": False}))
    assert isinstance(result, PlanResult)
    return result


def test_losses_bursts_and_sensitivity_are_asked() -> None:
    result = asked()
    names = [item.name for item in result.what_ifs]
    for worker, _ in result.design.counts:
        assert f"1 {worker.label} lost" in names
    assert "bursts: arrival CV 2" in names
    assert {"rate x 0.8", "rate x 1.2"} <= {item.name for item in result.sensitivity}
    assert all(0 <= item.attainment <= 1 for item in result.what_ifs)


def test_less_load_is_kept_and_much_more_is_not() -> None:
    by_name = {item.name: item for item in asked().sensitivity}
    assert by_name["rate x 0.8"].is_kept
    assert not by_name["rate x 1.2"].is_kept
    assert by_name["rate x 1.2"].advice


def test_overload_has_a_verdict_and_no_percentiles() -> None:
    for item in asked().sensitivity:
        if item.verdict == "overloaded":
            assert item.ttft_p90_s is None


def test_spare_plan_has_more_workers() -> None:
    result = asked()
    assert result.spare is not None
    assert result.spare.design.num_workers > result.design.num_workers


def test_curve_falls_with_the_rate() -> None:
    points = asked().curves[0].points
    assert points[0][1] >= points[-1][1]
    assert [rate for rate, _ in points] == sorted(rate for rate, _ in points)


def test_what_is_advised_after_a_loss_is_the_worker_that_was_lost() -> None:
    workload = small_inputs().workload.model_dump(mode="json", exclude_none=True)
    result = solve(
        small_inputs(
            objective={"goal": "gpus"},
            workload={**workload, "rate": 6.0},
            search={"what_ifs": True, "colocated": False},
        )
    )
    assert isinstance(result, PlanResult)
    lost = [item for item in result.what_ifs if item.name.endswith(" lost") and not item.is_kept]
    assert lost
    for item in lost:
        label = item.name.removeprefix("1 ").removesuffix(" lost")
        assert item.advice.startswith(f"add 1 {label} "), item


def test_where_no_worker_helps_the_rate_that_holds_is_told() -> None:
    problem = new_problem(small_inputs())
    evaluator = new_evaluator(problem)
    design = choose(problem, evaluator).design
    assert design is not None
    questions = Questions(problem, evaluator, design, 2.0)
    questions.max_advice = 1
    advice = questions._advice(evaluator, design, 60.0)
    words = re.fullmatch(r"at most (\S+) requests/s; 1 workers more do not help enough", advice)
    assert words is not None, advice
    assert evaluator.margin(design, float(words[1]) * 0.97, 0).all >= 0
