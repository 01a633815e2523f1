"""From the inputs to a problem: workers, bounds, traffic, judge, and cells of large clusters."""

from dataclasses import dataclass, replace

from pdserve.domain.errors import LocalFault
from placement.plan_inputs import GOALS_AT_RATE, PlanInputs
from placement.profiles import SplitwiseProfile, load_profile
from placement.search.bounds import Bounds
from placement.search.designs import Design, Worker
from placement.search.enumerate import (
    MAX_BATCH,
    Fleet,
    Found,
    LengthFacts,
    find_workers,
    fitted_of,
    resolve_fleets,
)
from placement.search.judging import Judge, class_judge, slowdown_judge, splitwise_token_s
from placement.search.space import Space
from placement.search.traffic import Traffic
from placement.simulation.settings import resolve_options
from placement.simulation.values import (
    PoolRole,
    Rules,
    SimulationConfig,
    SplitwiseOptions,
    TrafficClass,
)

NOMINAL_CLASS = TrafficClass(ttft_s=60.0, tpot_s=10.0, attainment=0.5)
"""For bounds under Splitwise's relative limits, which have no seconds: far away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is searched. With `num_cells` above 1 fleets and rate are those of one cell."""

    inputs: PlanInputs
    fleets: tuple[Fleet, ...]
    found: Found
    base: SimulationConfig  # what every design is simulated with beside its own pools
    space: Space
    traffic: Traffic
    judge: Judge
    rate: float | None
    num_cells: int
    num_unused_gpus: int

    @property
    def slo(self) -> tuple[TrafficClass, ...]:
        return self.base.slo

    @property
    def num_gpus(self) -> int:
        return sum(fleet.num_gpus for fleet in self.fleets)

    @property
    def is_at_rate(self) -> bool:
        return self.inputs.objective.goal in GOALS_AT_RATE

    def price(self, design: Design) -> float:
        """What the objective minimises."""
        goal = self.inputs.objective.goal
        if goal == "cost":
            return design.usd_per_hour
        return design.watts if goal == "power" else float(design.num_gpus)

    def value(self, design: Design, rate: float) -> float:
        """What the objective maximises, at a goodput of `rate`."""
        if self.inputs.objective.goal == "goodput":
            return rate
        return rate / max(design.num_gpus, 1)


def new_problem(inputs: PlanInputs) -> Problem:
    """Resolve names, files and sizes; raises `LocalFault` for what cannot be, and why."""
    slo = inputs.classes
    fleets = resolve_fleets(inputs)
    traffic = Traffic(inputs.workload, slo, seed=inputs.search.seed)
    sample = traffic.sample()
    max_prompt, max_total = traffic.longest()
    facts = LengthFacts(
        mean_prompt=float(sample[0].mean()),
        mean_context=float((sample[0] + sample[1] / 2).mean()),
        max_prompt=max_prompt,
        max_total=max_total,
    )
    found = find_workers(inputs, fleets, facts)
    cell, num_cells, num_unused = _cells(fleets, inputs.search.max_cell_gpus)
    fitted = fitted_of(inputs)
    pdserve = resolve_options(inputs.pdserve, fitted)
    bounded = slo or (NOMINAL_CLASS,)
    steps = inputs.search.max_step_tokens if inputs.rules is Rules.PDSERVE else (512,)
    if fitted is not None:  # longer steps were not measured
        most = fitted.limits.max_step_tokens
        steps = tuple(tokens for tokens in steps if tokens <= most) or (most,)
    handoff_s = pdserve.handoff_s if inputs.rules is Rules.PDSERVE else 0.0
    bounds = {
        tokens: _bounds(inputs, found.workers, bounded, traffic, tokens, handoff_s)
        for tokens in steps
    }
    judge = class_judge(slo)
    if inputs.slo == "splitwise":
        judge = _splitwise_judge(inputs)
    else:
        bounds = _possible(bounds)
    able = tuple(
        worker
        for worker in found.workers
        if inputs.slo == "splitwise" or any(b.can_serve(worker) for b in bounds.values())
    )
    able = tuple(worker for worker in able if not _is_dominated(worker, able, inputs.rules))
    search = inputs.search
    space = Space(
        fleets=cell,
        workers=able,
        bounds=bounds,
        rules=inputs.rules,
        mean_prompt_tokens=facts.mean_prompt,
        is_mixed_allowed=inputs.rules is Rules.PDSERVE
        and (search.mixed and search.disaggregated and search.colocated),
    )
    peak = inputs.workload.peak_rate
    return Problem(
        inputs=inputs,
        fleets=cell,
        found=found,
        base=SimulationConfig(
            pools=(),
            rules=inputs.rules,
            slo=slo,
            pdserve=pdserve,
            splitwise=SplitwiseOptions(scheduler=inputs.splitwise.scheduler),
        ),
        space=space,
        traffic=traffic,
        judge=judge,
        rate=None if peak is None else peak / num_cells,
        num_cells=num_cells,
        num_unused_gpus=num_unused,
    )


def _bounds(
    inputs: PlanInputs,
    workers: tuple[Worker, ...],
    slo: tuple[TrafficClass, ...],
    traffic: Traffic,
    tokens: int,
    handoff_s: float,
) -> Bounds:
    return Bounds(
        workers,
        inputs.rules,
        slo,
        traffic.sample(),
        gap_cv=traffic.gap_cv,
        max_step_tokens=tokens,
        max_batch=MAX_BATCH,
        handoff_s=handoff_s,
    )


def bounds_of(problem: Problem, traffic: Traffic, tokens: int) -> Bounds:
    """Bounds of the problem's workers for other requests."""
    is_ours = problem.inputs.rules is Rules.PDSERVE
    handoff_s = problem.base.pdserve.handoff_s if is_ours else 0.0
    return _bounds(problem.inputs, problem.found.workers, problem.slo, traffic, tokens, handoff_s)


def _cells(fleets: tuple[Fleet, ...], max_gpus: int) -> tuple[tuple[Fleet, ...], int, int]:
    """Cut a large cluster into equal cells: the most GPUs used, then the largest cells.

    A router over all workers does at least as well as one for each cell.
    """
    total = sum(fleet.num_gpus for fleet in fleets)
    if total <= max_gpus:
        return fleets, 1, 0
    best: tuple[int, int] = (0, -1)
    for number in range(2, max(fleet.nodes for fleet in fleets) + 1):
        per_cell = sum((f.nodes // number) * f.gpus_per_node for f in fleets)
        if 0 < per_cell <= max_gpus:
            best = max(best, (per_cell * number, -number))
    number = -best[1]
    if best[0] == 0:
        return fleets, 1, 0
    cell = tuple(
        replace(fleet, nodes=fleet.nodes // number) for fleet in fleets if fleet.nodes >= number
    )
    return cell, number, total - best[0]


def _possible(bounds: dict[int, Bounds]) -> dict[int, Bounds]:
    """The step sizes whose floors the promises keep; raises the last one's fault if none does."""
    found, fault = {}, None
    for tokens, item in bounds.items():
        try:
            item.check_floors()
        except LocalFault as error:
            fault = error
        else:
            found[tokens] = item
    if fault is not None and not found:
        raise fault
    return found


def _is_dominated(worker: Worker, others: tuple[Worker, ...], rules: Rules) -> bool:
    """Under rules distserve KV memory is free, and a decode pipeline is never better than its
    stages' GPUs as workers of their own: steps last as long, and each stage pays the first one's
    overhead."""
    if rules is not Rules.DISTSERVE or worker.role is not PoolRole.DECODE or worker.pp == 1:
        return False
    return any(
        other.role is worker.role
        and other.pp == 1
        and (other.gpu, other.tp) == (worker.gpu, worker.tp)
        for other in others
    )


def splitwise_profile(inputs: PlanInputs) -> SplitwiseProfile:
    """The published measurements that the inputs name."""
    assert inputs.latency is not None
    assert inputs.latency.profile is not None
    profile = load_profile(inputs.latency.profile)
    assert isinstance(profile, SplitwiseProfile)
    return profile


def _splitwise_judge(inputs: PlanInputs) -> Judge:
    assert inputs.latency is not None
    profile = splitwise_profile(inputs)
    reference = profile.timing(inputs.latency.model, hardware="a100-80gb", tp=8)
    return slowdown_judge(reference, splitwise_token_s(reference))
