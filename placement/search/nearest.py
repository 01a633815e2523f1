"""Where no plan exists: the nearest rate, promise and cluster that have one."""

import math
from dataclasses import replace

import numpy as np

from placement.search.choose import most_goodput
from placement.search.designs import Design
from placement.search.evaluate import Evaluator
from placement.search.problem import Problem
from placement.search.results import NoPlan

SLACK = 1.02
MAX_TIMES = 64
OVERLOAD = 3.0  # times the best rate: no promise will do, and nothing need be simulated
CLUSTER_STEPS = 5


def explain_no_plan(problem: Problem, evaluator: Evaluator) -> NoPlan:
    """Search the most goodput of the cluster instead, and say what is missing."""
    choice = most_goodput(problem, evaluator, value=lambda design, rate: rate, is_certified=False)
    best, rate = choice.design, choice.goodput.rate
    cells = problem.num_cells
    if best is None:
        floors = [
            f"slo {item.name}: unloaded TTFT {floor.ttft_s:.3g} s, TPOT {floor.tpot_s:.3g} s"
            for item in problem.slo
            for floor in [next(iter(problem.space.bounds.values())).floor(item)]
        ]
        return NoPlan(reason="no design keeps the promises at any rate", nearest=tuple(floors))
    asked = problem.rate
    if asked is None:
        return NoPlan(reason="no design was certified", nearest=(), best=best, best_rate=rate)
    nearest = [f"rate: {rate * cells:.3g} requests/s with {best.label}"]
    nearest += _nearest_slo(problem, evaluator, best, asked, rate)
    nearest += _nearest_cluster(problem, evaluator, best, asked, rate)
    return NoPlan(
        reason=f"{asked * cells:.4g} requests/s are beyond this cluster of "
        f"{problem.num_gpus * cells} GPUs; the best it can do is {rate * cells:.3g} requests/s",
        nearest=tuple(nearest),
        best=best,
        best_rate=rate * cells,
    )


def _nearest_slo(
    problem: Problem, evaluator: Evaluator, design: Design, rate: float, best_rate: float
) -> list[str]:
    """The promise that the best design would keep at the asked rate, if it is not overloaded."""
    if not problem.slo:
        return []
    asked = rate * problem.num_cells
    overloaded = f"promise: none; at {asked:.4g} requests/s {design.label} is overloaded"
    if rate > OVERLOAD * best_rate:
        return [overloaded]
    done = evaluator.run(design, rate, 0, evaluator.search_horizon_s(rate))
    if done is None:
        return []
    from placement.search.predict import predict

    seen = predict(evaluator, design, rate, num_seeds=1, horizon_s=evaluator.search_horizon_s(rate))
    if seen.percentiles is None:
        return [overloaded]
    times, _, classes = done
    parts = []
    for index, item in enumerate(problem.slo):
        members = classes == index
        # Half of the misses for each promise, so that both together hold.
        share = 1 - (1 - item.attainment) / 2
        ttft = max(float(np.quantile(times.ttft_s[members], share)), item.ttft_s)
        tpot = max(float(np.quantile(times.tpot_s[members], share)), item.tpot_s)
        parts.append(f"{item.name} ttft_s {ttft * SLACK:.3g}, tpot_s {tpot * SLACK:.3g}")
    return [f"promise: {'; '.join(parts)} with {design.label}"]


def _nearest_cluster(
    problem: Problem, evaluator: Evaluator, best: Design, asked: float, rate: float
) -> list[str]:
    """The same node types, so many times as many, with so many times the best design's workers.

    Checked by simulating; a search there might need fewer.
    """
    times = asked / max(rate, 1e-9)
    if times > MAX_TIMES:
        return []
    for step in range(CLUSTER_STEPS):
        factor = times * (1 + 0.1 * step)
        fleets = tuple(
            replace(fleet, nodes=math.ceil(fleet.nodes * factor)) for fleet in problem.fleets
        )
        grown = min(new.nodes / old.nodes for new, old in zip(fleets, problem.fleets, strict=True))
        design = problem.space.design(
            {worker: math.floor(count * grown) for worker, count in best.counts},
            best.max_step_tokens,
        )
        horizon_s = evaluator.search_horizon_s(asked)
        if not replace(problem.space, fleets=fleets).fits(design):
            continue
        if evaluator.holds(design, asked, evaluator.search_seeds, horizon_s):
            nodes = ", ".join(f"{f.nodes * problem.num_cells} nodes of {f.gpu}" for f in fleets)
            return [f"cluster: {nodes}, with {design.label}"]
    return []
