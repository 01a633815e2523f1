"""Plans of small random questions beside brute force over all configurations.

    python -m bench.planner.optimality [--instances 30] [--first-seed 0] [--two-types]

Both use the same simulator, traces and seeds. The planner agrees where its objective is not below
that of the best configuration by more than the stated tolerance and both intervals.

`--two-types`: clusters of two GPU types under our own rules, by the latency model, where brute
force goes over every number of every worker, types and kinds mixed in every way.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from placement.plan_inputs import PlanInputs, parse_inputs
from placement.search.choose import Choice, choose, new_evaluator
from placement.search.designs import Design
from placement.search.evaluate import Evaluator, Goodput
from placement.search.links import is_placeable
from placement.search.problem import Problem, new_problem
from tests.support.exhaustive import all_designs, two_type_question

GOALS = ("goodput_per_gpu", "goodput", "gpus")


def random_question(seed: int) -> dict[str, Any]:
    """One question; lengths, burstiness, promises and cluster differ."""
    rng = random.Random(seed)
    goal = GOALS[seed % len(GOALS)]
    is_ours = seed % 5 == 4
    gpus = rng.choice([2, 3, 4]) if is_ours else rng.choice([3, 4, 6, 8])
    return {
        "model": "facebook/opt-13b",
        "rules": "pdserve" if is_ours else "distserve",
        "latency": {"profile": "profiler-a100-80g.distserve.json"},
        "cluster": {"nodes": [{"gpu": "a100_sxm", "nodes": 1, "gpus_per_node": gpus}]},
        "workload": {
            "prompt_tokens": {"mean": rng.choice([150, 400, 800]), "cv": 0.7, "max": 1900},
            "output_tokens": {"mean": rng.choice([30, 120, 250]), "cv": 0.7, "max": 900},
            "cv": rng.choice([0.5, 1.0, 2.0]),
            "rate": rng.choice([1.0, 3.0, 6.0]),
        },
        "slo": {"ttft_s": rng.choice([0.3, 0.6]), "tpot_s": rng.choice([0.04, 0.1])},
        "objective": {"goal": goal},
        "search": {"duration_s": 120, "seeds": 3, "what_ifs": False},
    }


def brute_force(
    problem: Problem, evaluator: Evaluator, designs: Iterable[Design]
) -> tuple[Design | None, Goodput]:
    """The best of every configuration; no bound, estimate or blame spares a simulation."""
    nothing = Goodput(rate=0.0, interval=(0.0, 0.0), margins=())
    best: tuple[Design | None, Goodput] = (None, nothing)
    for design in designs:
        if problem.is_at_rate:
            assert problem.rate is not None
            is_cheaper = best[0] is None or problem.price(design) < problem.price(best[0])
            is_held = is_cheaper and evaluator.holds(design, problem.rate, evaluator.num_seeds)
            if is_held and is_placeable(evaluator, design, problem.fleets, problem.rate):
                best = (design, nothing)
            continue
        found = evaluator.goodput(
            design,
            max(problem.space.estimate(design), 0.1),
            num_seeds=evaluator.num_seeds,
            tolerance=problem.inputs.search.tolerance,
        ).at_most(problem.space.link_rate(design))
        value = problem.value(design, found.rate)
        is_better = best[0] is None or value > problem.value(best[0], best[1].rate)
        if is_better and is_placeable(evaluator, design, problem.fleets, found.rate):
            best = (design, found)
    return best


def agrees(problem: Problem, choice: Choice, best: tuple[Design | None, Goodput]) -> bool:
    """Within the tolerance and the intervals of both."""
    if choice.design is None or best[0] is None:
        return choice.design is None and best[0] is None
    if problem.is_at_rate:
        return problem.price(choice.design) <= problem.price(best[0]) * (1 + 1e-9)
    ours = problem.value(choice.design, choice.goodput.interval[1])
    theirs = problem.value(best[0], best[1].interval[0])
    return ours * (1 + problem.inputs.search.tolerance) >= theirs


def run_instance(seed: int, *, is_two_types: bool) -> dict[str, Any]:
    question = two_type_question(seed) if is_two_types else random_question(seed)
    inputs: PlanInputs = parse_inputs(question, source=f"question {seed}")
    problem = new_problem(inputs)
    start_s = time.process_time()
    evaluator = new_evaluator(problem)
    choice = choose(problem, evaluator)
    plan_s = time.process_time() - start_s
    start_s = time.process_time()
    force = new_evaluator(problem)
    designs = list(all_designs(problem) if is_two_types else problem.space.listed())
    best = brute_force(problem, force, designs)

    gap = None
    if choice.design is not None and best[0] is not None and not problem.is_at_rate:
        # The plan's own design as brute force measures it, so that only the choice is compared.
        measured = force.goodput(
            choice.design,
            choice.goodput.rate,
            num_seeds=force.num_seeds,
            tolerance=problem.inputs.search.tolerance,
        )
        gap = 1 - problem.value(choice.design, measured.rate) / problem.value(best[0], best[1].rate)
    elif choice.design is not None and best[0] is not None:
        gap = problem.price(choice.design) / problem.price(best[0]) - 1

    def objective(design: Design | None, rate: float) -> float | None:
        if design is None:
            return None
        return problem.price(design) if problem.is_at_rate else problem.value(design, rate)

    return {
        "seed": seed,
        "rules": str(inputs.rules),
        "gpus": problem.num_gpus,
        "goal": inputs.objective.goal,
        "configurations": len(designs),
        "plan": choice.design.label if choice.design else None,
        "plan_objective": objective(choice.design, choice.goodput.rate),
        "best": best[0].label if best[0] else None,
        "best_objective": objective(best[0], best[1].rate),
        "gap": gap,
        "agrees": agrees(problem, choice, best),
        "plan_runs": evaluator.num_runs,
        "force_runs": force.num_runs,
        "plan_cpu_s": plan_s,
        "force_cpu_s": time.process_time() - start_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--two-types", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(options.first_seed, options.first_seed + options.instances):
        row = run_instance(seed, is_two_types=options.two_types)
        rows.append(row)
        mark = "=" if row["agrees"] else "DIFFERS"
        found, best = row["plan_objective"], row["best_objective"]
        print(
            f"{seed:3d} {row['rules']:9} {row['gpus']} GPUs {row['goal']:15} "
            f"{row['configurations']:4d} configs  plan {found or 0:8.4g} {row['plan']}  "
            f"best {best or 0:8.4g} {row['best']}  {mark}  "
            f"{row['plan_runs']} runs {row['plan_cpu_s']:.1f} s "
            f"against {row['force_runs']} runs {row['force_cpu_s']:.1f} s",
            flush=True,
        )
    gaps = sorted(max(row["gap"] or 0.0, 0.0) for row in rows)
    print(
        f"{sum(row['agrees'] for row in rows)} of {len(rows)} agree; "
        f"{sum(row['plan'] == row['best'] for row in rows)} are the same design; the plan's is "
        f"worse by {gaps[len(gaps) // 2]:.1%} in the median, {gaps[-1]:.1%} at most"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
