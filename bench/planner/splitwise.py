"""Splitwise's question: the cheapest and the least-power cluster of A100s and H100s.

    python -m bench.planner.splitwise [--models bloom-176b llama2-70b] [--traces azure-conv ...]

Each trace's lengths at 10 requests/s under the nine SLOs, by the rules of Splitwise's simulator.
Beside each plan stands the answer of exhaustive search by the same simulator, requests and seeds:
every number of prefill and decode machines of both types, and of colocated machines of both types,
in the order of the price, up to the least price at which one keeps all nine. Nothing is bounded,
estimated or taken to be monotone, so that no design is cheaper than what it finds.

The corrected answer reads decode times at the true batch and context
(`placement.search.splitwise_question`); `--exhaustive-corrected` searches for that one too.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from placement.plan_inputs import PlanInputs
from placement.search.choose import new_evaluator
from placement.search.designs import Design
from placement.search.problem import new_problem
from placement.search.results import PlanResult
from placement.search.splitwise_question import corrected_evaluator, corrected_problem
from placement.simulation.warm import warm_up
from placement.solver import solve
from tests.support.exhaustive import EPSILON, exhaust, machines_apart, splitwise_question

MODELS = ("bloom-176b", "llama2-70b")
TRACES = ("azure-conv", "azure-code-all")
GOALS = ("cost", "power")


def counts_text(design: Design) -> str:
    """Such as 6 prefill a100-80gb + 2 decode h100-80gb."""
    return " + ".join(f"{count} {worker.role} {worker.gpu}" for worker, count in design.counts)


def ask(inputs: PlanInputs, *, is_corrected_exhausted: bool) -> dict[str, Any]:
    """Plan, search exhaustively, compare."""
    start_s = time.process_time()
    plan = solve(inputs)
    plan_s = time.process_time() - start_s
    assert isinstance(plan, PlanResult)
    problem = new_problem(inputs)
    best = exhaust(problem, new_evaluator(problem), problem.price(plan.design))
    row: dict[str, Any] = {
        "plan": counts_text(plan.design),
        "price": problem.price(plan.design),
        "exhaustive": [counts_text(design) for design in best.designs],
        "exhaustive_price": best.price,
        "machines_apart": machines_apart(plan.design, best.designs),
        "plan_cpu_s": plan_s,
        "exhaustive_cpu_s": best.cpu_s,
        "exhaustive_designs": best.num_simulated,
        "corrected": None,
    }
    if plan.corrected is not None:
        row["corrected"] = counts_text(plan.corrected.design)
        row["corrected_price"] = problem.price(plan.corrected.design)
    if plan.corrected is not None and is_corrected_exhausted:
        corrected = corrected_problem(problem)
        fresh = corrected_evaluator(corrected, new_evaluator(problem))
        truth = exhaust(corrected, fresh, corrected.price(plan.corrected.design))
        row |= {
            "corrected_exhaustive": [counts_text(design) for design in truth.designs],
            "corrected_exhaustive_price": truth.price,
            "corrected_machines_apart": machines_apart(plan.corrected.design, truth.designs),
            "corrected_exhaustive_cpu_s": truth.cpu_s,
            "corrected_exhaustive_designs": truth.num_simulated,
        }
    return row


def show(name: str, row: dict[str, Any]) -> None:
    print(f"{name}")
    print(f"  plan        {row['plan']}; {row['price']:.2f}; {row['plan_cpu_s']:.1f} CPU s")
    ratio = row["exhaustive_cpu_s"] / row["plan_cpu_s"]
    print(
        f"  exhaustive  {' | '.join(row['exhaustive'])}; {row['exhaustive_price']:.2f}; "
        f"{row['exhaustive_designs']} designs, {row['exhaustive_cpu_s']:.1f} CPU s "
        f"({ratio:.1f} x); at most {row['machines_apart']} machines apart"
    )
    if row["corrected"]:
        print(f"  corrected   {row['corrected']}; {row['corrected_price']:.2f}")
    if "corrected_exhaustive" in row:
        print(
            f"  exhaustive  {' | '.join(row['corrected_exhaustive'])}; "
            f"{row['corrected_exhaustive_price']:.2f}; {row['corrected_exhaustive_designs']} "
            f"designs, {row['corrected_exhaustive_cpu_s']:.1f} CPU s; at most "
            f"{row['corrected_machines_apart']} machines apart"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--traces", nargs="+", default=TRACES, help="packaged names, or files")
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=GOALS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="traces that a design is judged on")
    parser.add_argument("--exhaustive-corrected", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warm_up()  # compiling is not part of what is compared
    rows = []
    for model in options.models:
        for trace in options.traces:
            for goal in options.goals:
                inputs = splitwise_question(
                    model, trace, goal, seed=options.seed, seeds=options.seeds
                )
                row = ask(inputs, is_corrected_exhausted=options.exhaustive_corrected)
                rows.append({"model": model, "trace": trace, "goal": goal, **row})
                show(f"{model}, {Path(trace).stem}, least {goal}", row)
    worst = max(row["machines_apart"] for row in rows)
    same = sum(row["price"] <= row["exhaustive_price"] * (1 + EPSILON) for row in rows)
    slowest_s = max(row["plan_cpu_s"] for row in rows)
    print(
        f"{same} of {len(rows)} plans at the exhaustive price, at most {worst} machines apart in "
        f"a pool; a plan takes at most {slowest_s:.1f} CPU s"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
