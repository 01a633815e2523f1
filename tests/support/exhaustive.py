"""Every design of a small question, and the best by simulation: what the planner must equal.

Nothing here is bounded, estimated or taken to be monotone.
"""

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from placement.plan_inputs import PlanInputs, parse_inputs
from placement.search.designs import Design, Worker
from placement.search.evaluate import Evaluator
from placement.search.problem import Problem
from placement.simulation.values import PoolRole

TWO_TYPE_GOALS = ("cost", "goodput", "power", "goodput_per_gpu")
RATE = 10.0
EPSILON = 1e-9


def two_type_question(seed: int) -> dict[str, Any]:
    """One question on a few GPUs of two types, small enough for every combination."""
    rng = random.Random(f"two types {seed}")
    goal = TWO_TYPE_GOALS[seed % len(TWO_TYPE_GOALS)]
    first, second = rng.sample(["a100_sxm", "h100_sxm", "l40s", "h200_sxm"], 2)
    nodes = [
        {"gpu": first, "nodes": 1, "gpus_per_node": rng.choice([1, 2, 3])},
        {"gpu": second, "nodes": 1, "gpus_per_node": rng.choice([1, 2])},
    ]
    return {
        "model": "Llama-3.1-8B",
        "cluster": {"nodes": nodes},
        "workload": {
            "prompt_tokens": {"mean": rng.choice([500, 1500, 4000]), "cv": 0.7, "max": 12_000},
            "output_tokens": {"mean": rng.choice([60, 200]), "cv": 0.7, "max": 900},
            "cv": rng.choice([0.5, 1.0, 2.0]),
            "rate": rng.choice([1.0, 2.0, 4.0]),
        },
        "slo": {"ttft_s": rng.choice([0.8, 1.5]), "tpot_s": rng.choice([0.03, 0.06])},
        "objective": {"goal": goal},
        "search": {
            "duration_s": 120,
            "seeds": 3,
            "what_ifs": False,
            "tp": [1, 2],
            "pp": [1],
            "max_step_tokens": [2048],
        },
    }


def all_designs(problem: Problem) -> Iterator[Design]:
    """Every number of every worker that the cluster holds, types and kinds mixed."""
    workers = problem.space.workers

    def grow(first: int, counts: dict[Worker, int]) -> Iterator[Design]:
        for index in range(first, len(workers)):
            grown = {**counts, workers[index]: counts.get(workers[index], 0) + 1}
            design = problem.space.design(grown)
            if problem.space.fits(design):
                if design.is_complete:
                    yield design
                yield from grow(index, grown)

    return grow(0, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhausted:
    """All designs of the least price that hold; what the search took."""

    designs: tuple[Design, ...]
    price: float
    num_simulated: int
    cpu_s: float


def splitwise_question(model: str, trace: str, goal: str, *, seed: int, seeds: int) -> PlanInputs:
    """The inputs of one of Splitwise's eight questions."""
    data = {
        "model": model,
        "rules": "splitwise",
        "latency": {"profile": "perf_model.csv"},
        "cluster": {
            "nodes": [{"gpu": "a100-80gb", "nodes": 60}, {"gpu": "h100-80gb", "nodes": 60}]
        },
        "workload": {"trace": trace, "rate": RATE},
        "slo": "splitwise",
        "objective": {"goal": goal},
        "search": {
            "duration_s": 300,
            "seeds": seeds,
            "seed": seed,
            "max_cell_gpus": 4096,
            "tp": [8],
            "pp": [1],
        },
    }
    return parse_inputs(data, source=f"{model} {trace} {goal}")


def designs_up_to(problem: Problem, limit: float) -> list[tuple[float, Design]]:
    """Every disaggregated and every colocated design up to a price, the cheapest first."""
    split = [w for w in problem.space.workers if w.role is not PoolRole.COLOCATED]
    both = [w for w in problem.space.workers if w.role is PoolRole.COLOCATED]
    found: list[tuple[float, Design]] = []
    for kinds in (split, both):
        box = [range(int(limit / problem.price(problem.space.design({w: 1}))) + 1) for w in kinds]
        for counts in itertools.product(*box):
            design = problem.space.design(dict(zip(kinds, counts, strict=True)))
            if design.is_complete and problem.price(design) <= limit:
                found.append((problem.price(design), design))
    return sorted(found, key=lambda item: (item[0], item[1].key))


def exhaust(problem: Problem, evaluator: Evaluator, limit: float) -> Exhausted:
    """Simulate every design from the cheapest up to the least price at which one holds.

    `limit`: where to stop looking; one that holds must be below it. Designs of the same price are
    all simulated.
    """
    assert problem.rate is not None
    start_s = time.process_time()
    found: list[Design] = []
    least, number = limit, 0
    for price, design in designs_up_to(problem, limit * (1 + EPSILON)):
        if price > least * (1 + EPSILON):
            break
        number += 1
        if evaluator.holds(design, problem.rate, evaluator.num_seeds):
            least = min(least, price)
            found.append(design)
    return Exhausted(
        designs=tuple(found),
        price=least,
        num_simulated=number,
        cpu_s=time.process_time() - start_s,
    )


def machines_apart(design: Design, others: tuple[Design, ...]) -> int:
    """The most by which a pool's count differs from the nearest of `others`."""

    def apart(other: Design) -> int:
        a, b = dict(design.counts), dict(other.counts)
        return max(abs(a.get(worker, 0) - b.get(worker, 0)) for worker in {*a, *b})

    return min(apart(other) for other in others)
