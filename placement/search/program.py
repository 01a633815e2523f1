"""A first design for clusters too large to list: an integer program over estimates.

    maximise   rate - price * GPUs, or minimise the price at a rate
    with       n[w] whole, of each role and GPU type at most one cut
               sum over prefill  r[w] n[w] >= rate - both
               sum over decode   r[w] n[w] >= rate - both,  both = sum over colocated r[w] n[w]
               GPUs of each type within the cluster

HiGHS solves it; the search then simulates from there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import highspy
import numpy as np

from placement.search.designs import Worker
from placement.simulation.values import PoolRole

TIME_LIMIT_S = 5.0
GAP = 1e-4
MAX_RATE = 1e7


def solve_mix(
    workers: tuple[Worker, ...],
    rates: Mapping[Worker, float],
    gpus: Mapping[str, int],
    *,
    price: Callable[[Worker], float],
    rate: float | None = None,
) -> dict[Worker, int] | None:
    """Counts that maximise rate less price, or minimise the price at `rate`; None: impossible."""
    workers = tuple(worker for worker in workers if rates[worker] > 0)
    model = new_program()
    model.setOptionValue("mip_rel_gap", GAP)
    most = {worker: gpus[worker.gpu] // worker.num_gpus for worker in workers}
    counts = {w: model.addIntegral(lb=0, ub=most[w]) for w in workers}
    chosen = {w: model.addBinary() for w in workers}
    flow = model.addVariable(lb=0 if rate is None else rate, ub=rate or MAX_RATE)
    for worker in workers:
        model.addConstr(counts[worker] - most[worker] * chosen[worker] <= 0)
    for gpu, number in gpus.items():
        mine = [w for w in workers if w.gpu == gpu]
        if mine:
            model.addConstr(sum(w.num_gpus * counts[w] for w in mine) <= number)
        for role in PoolRole:
            same = [chosen[w] for w in mine if w.role is role]
            if same:
                model.addConstr(sum(same) <= 1)
    for role in (PoolRole.PREFILL, PoolRole.DECODE):
        serving = [w for w in workers if w.role in (role, PoolRole.COLOCATED)]
        if not serving:
            return None
        model.addConstr(sum(rates[w] * counts[w] for w in serving) - flow >= 0)
    total = sum(price(w) * counts[w] for w in workers)
    if rate is None:
        model.maximize(flow - total)
    else:
        model.minimize(total)
    values = solution(model)
    if values is None:
        return None
    found = {w: int(np.rint(values[counts[w].index])) for w in workers}
    return {w: n for w, n in found.items() if n > 0} or None


def new_program() -> Any:
    """An empty program that is solved alike at every run."""
    model = highspy.Highs()  # type: ignore[no-untyped-call]
    model.setOptionValue("output_flag", False)
    model.setOptionValue("random_seed", 0)
    model.setOptionValue("threads", 1)
    model.setOptionValue("time_limit", TIME_LIMIT_S)
    return model


def solution(model: Any) -> Sequence[float] | None:
    """Values of the variables, the best or those at the time limit; None where there are none."""
    status = highspy.HighsModelStatus
    if model.getModelStatus() not in (status.kOptimal, status.kTimeLimit):
        return None
    values: Sequence[float] = model.getSolution().col_value
    return values
