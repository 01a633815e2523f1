"""The planner against brute force, and laws that its answers obey."""

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.plan_inputs import PlanInputs
from placement.search.choose import choose, new_evaluator
from placement.search.problem import Problem, new_problem
from tests.support.plan_inputs import small_inputs

SLACK = 0.05  # of the objective: the search's tolerance and the spread of short traces


def instance(seed: int, gpus: int = 4) -> dict[str, Any]:
    """A small random question."""
    rng = random.Random(seed)
    return {
        "cluster": {"nodes": [{"gpu": "a100_sxm", "nodes": 1, "gpus_per_node": gpus}]},
        "workload": {
            "prompt_tokens": {"mean": rng.choice([150, 400, 800]), "cv": 0.7, "max": 1900},
            "output_tokens": {"mean": rng.choice([30, 120, 250]), "cv": 0.7, "max": 900},
            "cv": rng.choice([0.5, 1.0, 2.0]),
            "rate": rng.choice([0.5, 2.0, 4.0]),
        },
        "slo": {"ttft_s": rng.choice([0.3, 0.6]), "tpot_s": rng.choice([0.04, 0.1])},
        "search": {"duration_s": 60, "seeds": 2, "colocated": rng.random() < 0.7},
    }


def best_by_force(problem: Problem, inputs: PlanInputs) -> float:
    """The best value over every design, by the same simulator."""
    evaluator = new_evaluator(problem)
    best = 0.0
    for design in problem.space.listed():
        needed = best * 1.001 / problem.value(design, 1.0)
        if best and not evaluator.holds(design, needed, evaluator.num_seeds):
            continue
        found = evaluator.goodput(
            design,
            max(needed, problem.space.estimate(design), 0.1),
            num_seeds=evaluator.num_seeds,
            tolerance=inputs.search.tolerance,
        )
        best = max(best, problem.value(design, found.rate))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_plan_is_as_good_as_brute_force(seed: int) -> None:
    inputs = small_inputs(**instance(seed))
    problem = new_problem(inputs)
    choice = choose(problem, new_evaluator(problem))
    best = best_by_force(problem, inputs)
    found = problem.value(choice.design, choice.goodput.rate) if choice.design else 0.0
    assert found >= best * (1 - SLACK)


@pytest.mark.parametrize("seed", range(6, 10))
def test_cheapest_plan_costs_no_more_than_by_force(seed: int) -> None:
    inputs = small_inputs(**instance(seed), objective={"goal": "gpus"})
    problem = new_problem(inputs)
    evaluator = new_evaluator(problem)
    choice = choose(problem, evaluator)
    assert problem.rate is not None
    holding = [
        design.num_gpus
        for design in problem.space.listed()
        if evaluator.holds(design, problem.rate, evaluator.num_seeds)
    ]
    found = choice.design.num_gpus if choice.design else None
    assert found == min(holding, default=None)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000))
def test_more_gpus_never_lower_the_goodput(seed: int) -> None:
    found = []
    for gpus in (2, 4):
        question = instance(seed, gpus)
        question["search"] = {"duration_s": 60, "seeds": 2}
        problem = new_problem(small_inputs(**question, objective={"goal": "goodput"}))
        found.append(choose(problem, new_evaluator(problem)).goodput.rate)
    assert found[1] >= found[0] * (1 - SLACK)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000))
def test_same_seed_gives_the_same_plan_and_neighbours_are_not_better(seed: int) -> None:
    inputs = small_inputs(**instance(seed))
    choices = []
    for _ in range(2):
        problem = new_problem(inputs)
        evaluator = new_evaluator(problem)
        choices.append(choose(problem, evaluator))
    first, second = choices
    assert (first.design, first.goodput) == (second.design, second.goodput)
    if first.design is None:
        return
    best = problem.value(first.design, first.goodput.rate)
    for _, other in problem.space.neighbours(first.design):
        if problem.space.fits(other):
            rate = best * (1 + SLACK) / problem.value(other, 1.0)
            assert not evaluator.holds(other, rate, evaluator.num_seeds), other.label


def test_packing_agrees_with_trying_all_ways() -> None:
    from placement.search.space import _packs

    for sizes in itertools.product(range(4), range(3), range(3)):
        counts = [(1, sizes[0]), (2, sizes[1]), (4, sizes[2])]
        total = sum(size * count for size, count in counts)
        assert _packs([item for item in counts if item[1]], 2, 4) == (total <= 8)
