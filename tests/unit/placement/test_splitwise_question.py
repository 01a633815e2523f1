"""Splitwise's question: the planner against exhaustive search, and what it tells."""

import pytest

from placement.plan_inputs import PlanInputs
from placement.search.choose import new_evaluator
from placement.search.problem import new_problem
from placement.search.results import PlanResult
from placement.simulation.values import PoolRole
from placement.solver import solve
from tests.support.exhaustive import (
    designs_up_to,
    exhaust,
    machines_apart,
    splitwise_question,
)

SHORT_S = 60.0


def short(goal: str) -> PlanInputs:
    inputs = splitwise_question("llama2-70b", "azure-conv", goal, seed=0, seeds=1)
    search = inputs.search.model_copy(update={"duration_s": SHORT_S})
    return inputs.model_copy(update={"search": search})


@pytest.fixture(scope="module")
def cheapest() -> PlanResult:
    result = solve(short("cost"))
    assert isinstance(result, PlanResult)
    return result


def test_plan_is_that_of_exhaustive_search(cheapest: PlanResult) -> None:
    problem = new_problem(short("cost"))
    price = problem.price(cheapest.design)
    best = exhaust(problem, new_evaluator(problem), price)
    assert best.price == pytest.approx(price)
    assert machines_apart(cheapest.design, best.designs) == 0


def test_slowdowns_are_told_and_a_neighbour_names_the_limit_that_it_misses(
    cheapest: PlanResult,
) -> None:
    slowdowns = cheapest.prediction.slowdowns
    assert [item.name for item in slowdowns[:3]] == ["TTFT p50", "TTFT p90", "TTFT p99"]
    assert len(slowdowns) == 9
    assert all(item.value < item.limit for item in slowdowns)
    lost = [r.why_not for r in cheapest.neighbours if r.goodput == 0]
    assert lost
    assert all("slowdown" in text and "limit" in text for text in lost)


def test_few_cheaper_designs_are_all_listed_from_the_cheapest_up() -> None:
    problem = new_problem(short("power"))
    reader = problem.space.of_role(PoolRole.PREFILL)[0]
    writer = problem.space.of_role(PoolRole.DECODE)[1]
    design = problem.space.design({reader: 2, writer: 3})
    cheaper = problem.space.cheaper(design, problem.price, 1000)
    assert cheaper is not None
    prices = [problem.price(other) for other in cheaper]
    assert prices == sorted(prices)
    limit = problem.price(design) * (1 - 1e-6)
    assert set(cheaper) == {other for _, other in designs_up_to(problem, limit)}
    assert problem.space.cheaper(design, problem.price, len(cheaper) - 1) is None
    assert problem.space.cheaper(design, problem.price, 1) is None


def test_corrected_answer_mixes_types_in_a_pool_where_that_is_cheaper() -> None:
    inputs = splitwise_question("llama2-70b", "azure-conv", "cost", seed=0, seeds=1)
    result = solve(inputs)
    assert isinstance(result, PlanResult)
    assert result.corrected is not None
    # No pair of pools of one type each is as cheap.
    assert len(result.corrected.design.side(PoolRole.PREFILL)) == 2
