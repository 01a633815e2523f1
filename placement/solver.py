"""From inputs to a plan, or to the reason why there is none.

    answer = solve(read_inputs(path))      # PlanResult | NoPlan

Deterministic: the same inputs give the same answer, on any number of cores.
"""

from collections.abc import Callable
from dataclasses import replace

from pdserve.domain.errors import LocalFault
from placement.assign import Unplaceable, assign
from placement.plan_inputs import PlanInputs
from placement.profiles import DistserveProfile, load_profile
from placement.search.bursts import burst_above
from placement.search.choose import Choice, choose, few_cells, new_evaluator
from placement.search.designs import Design, Worker, gpus_text
from placement.search.enumerate import fitted_of
from placement.search.evaluate import Evaluator
from placement.search.links import kv_bytes_per_s
from placement.search.nearest import explain_no_plan
from placement.search.predict import economy, predict
from placement.search.problem import Problem, new_problem
from placement.search.results import (
    NoPlan,
    PlanResult,
    Prediction,
    Rival,
    SearchStats,
    WhatIf,
)
from placement.search.rivals import Rivals, spare_plan
from placement.search.what_if import BURST_CV, HEAVY_CV, Questions
from placement.simulation.values import Rules

MIN_GAIN = 0.01
NOUNS = {"cost": "money", "power": "power", "gpus": "GPUs"}

__all__ = ["NoPlan", "PlanResult", "Progress", "solve"]

Progress = Callable[[str, int], None]
"""Told what is being done, and how many simulations have been run."""


def solve(inputs: PlanInputs, progress: Progress | None = None) -> PlanResult | NoPlan:
    """Find the best plan; raises `LocalFault` for questions that cannot be answered."""
    stage = "reading"

    def on_run(num_runs: int) -> None:
        if progress is not None:
            progress(stage, num_runs)

    whole = new_problem(inputs)
    given = given_design(whole) if inputs.design else None
    stage = "searching"
    for problem in few_cells(whole):
        evaluator = new_evaluator(problem, on_run)
        evaluator.spare_workers = inputs.objective.spare_workers
        choice = choose(problem, evaluator)
        if choice.design is not None:
            break
    if choice.design is None:
        stage = "looking for the nearest plan"
        return explain_no_plan(problem, evaluator)
    stage = "asking what if"
    result = _describe(problem, evaluator, choice, choice.design)
    if isinstance(result, PlanResult) and inputs.slo == "splitwise":
        from placement.search.splitwise_question import corrected_plan

        stage = "reading decode times as measured"
        result = replace(result, corrected=corrected_plan(problem, evaluator))
    if isinstance(result, PlanResult) and given is not None:
        stage = "judging the given design"
        return replace(result, judged=_judge(problem, choice, given))
    return result


def given_design(problem: Problem) -> Design:
    """The pools of the inputs as a design; raises `LocalFault` for a worker that cannot be."""
    counts: dict[Worker, int] = {}
    for index, pool in enumerate(problem.inputs.design):
        matching = [
            worker
            for worker in problem.found.workers
            if (worker.role, worker.tp, worker.pp, worker.ep)
            == (pool.role, pool.tp, pool.pp, pool.ep)
            and pool.gpu in (None, worker.gpu)
        ]
        if not matching:
            known = sorted(
                {w.label for w in problem.found.workers if w.role is pool.role} or {"none"}
            )
            raise LocalFault(
                f"design[{index}]: no {pool.role} worker TP{pool.tp} PP{pool.pp} EP{pool.ep} "
                f"is possible here; possible: {', '.join(known)}"
            )
        counts[matching[0]] = counts.get(matching[0], 0) + pool.replicas
    design = problem.space.design(counts)
    if not design.is_complete:
        raise LocalFault("design: needs prefill and decode pools, or a colocated one")
    if not problem.space.fits(design):
        raise LocalFault(f"design: {design.label} does not fit the cluster")
    return design


def _describe(
    problem: Problem, evaluator: Evaluator, choice: Choice, design: Design
) -> PlanResult | NoPlan:
    """Everything about the chosen design; the what-ifs only where they are asked for."""
    rate = choice.goodput.rate
    if problem.is_at_rate and problem.rate is not None:
        rate = problem.rate
    result = _bare_result(problem, evaluator, choice, design, rate)
    if isinstance(result, Unplaceable):
        return NoPlan(
            reason=result.reason,
            nearest=("a cluster with faster links between nodes, or more nodes",),
            best=design,
            best_rate=rate,
        )
    rivals = Rivals(
        problem=problem, evaluator=evaluator, design=design, goodput=choice.goodput, rate=rate
    )
    runner_ups = rivals.runner_ups()
    neighbours = tuple(rivals.neighbours())
    result = replace(
        result,
        runner_ups=tuple(runner_ups),
        neighbours=neighbours,
        disaggregation=_verdict_on_disaggregation(problem, result, design, runner_ups),
        one_gpu_more=rivals.one_gpu_more(neighbours),
    )
    if problem.inputs.search.what_ifs and problem.slo:
        result = _with_what_ifs(problem, evaluator, result)
    return replace(result, stats=_stats(problem, evaluator, choice))


def _bare_result(
    problem: Problem, evaluator: Evaluator, choice: Choice, design: Design, rate: float
) -> PlanResult | Unplaceable:
    """A design's prediction, place and price; nothing that it is compared with."""
    prediction = predict(evaluator, design, rate)
    placed = assign(design, problem.fleets, kv_bytes_per_s(evaluator, design, rate))
    if isinstance(placed, Unplaceable):
        return placed
    prompts, outputs = problem.traffic.sample()
    mean_tokens = float(prompts.mean() + outputs.mean())
    return PlanResult(
        design=design,
        num_cells=problem.num_cells,
        prediction=prediction,
        goodput=choice.goodput.rate or prediction.rate,
        goodput_interval=choice.goodput.interval,
        economy=economy(design, prediction, mean_tokens),
        nodes=tuple(node.to_json() for node in placed.nodes),
        affinity=str(placed.affinity),
        cross_node_bytes_per_s=placed.cross_node_bytes_per_s,
        notes=_notes(problem, prediction),
        stats=_stats(problem, evaluator, choice),
        inputs=problem.inputs.model_dump(mode="json", exclude_none=True),
        sources=tuple(sorted({worker.source for worker, _ in design.counts})),
        relative_error=max(worker.relative_error for worker, _ in design.counts),
        burst=_burst(problem, prediction, max(choice.goodput.rate, prediction.rate)),
        gap_cv=problem.traffic.gap_cv,
    )


def _burst(problem: Problem, prediction: Prediction, rate: float) -> int:
    """How far the arrivals that the prediction was made with run ahead of `rate`."""
    traces = (
        problem.traffic.trace(seed, prediction.rate, prediction.horizon_s)[0]
        for seed in range(prediction.num_seeds)
    )
    return max((burst_above(trace.arrival_s, rate) for trace in traces), default=0)


def _notes(problem: Problem, prediction: Prediction) -> tuple[str, ...]:
    notes = []
    if problem.num_cells > 1:
        notes.append(
            f"{problem.num_cells} equal cells: one was searched and simulated; a router over all "
            "workers at once does at least as well"
        )
    if problem.num_unused_gpus:
        notes.append(f"free, since no cell has room for them: {gpus_text(problem.num_unused_gpus)}")
    if problem.inputs.workload.diurnal:
        notes.append("planned for the peak of the diurnal profile")
    if problem.inputs.rules is Rules.DISTSERVE:
        notes.append("rules distserve: KV transfers take no time and KV memory has no limit")
    if len(problem.fleets) > 1 and _is_of_one_type(problem.inputs):
        notes.append("the profile's step times are taken for every GPU type")
    if (context := _context_note(problem)) is not None:
        notes.append(context)
    low, high = prediction.interval
    if high - low > 0.1:
        longer = "" if problem.num_cells > 1 else " or a longer duration_s"
        notes.append(f"the interval of the attainment is wide: it takes more seeds{longer}")
    return tuple(notes)


def _is_of_one_type(inputs: PlanInputs) -> bool:
    """Whether step times are DistServe's, whose form does not know GPU types."""
    latency = inputs.latency
    if latency is None or latency.profile is None:
        return False
    return isinstance(load_profile(latency.profile), DistserveProfile)


def _context_note(problem: Problem) -> str | None:
    """Requests that the model cannot read, where its config says how long its context is."""
    inputs = problem.inputs
    if inputs.latency is not None and inputs.latency.profile is not None:
        return None
    from placement.model_config import load_model

    override = inputs.override_config
    given = override.context_tokens if override is not None else None
    context = given or load_model(inputs.model).max_position
    prompts, outputs = problem.traffic.sample()
    share = float((prompts + outputs > context).mean()) if context else 0.0
    if share == 0.0:
        return None
    return (
        f"{share:.1%} of the requests are longer than the model's context of {context} tokens: "
        "lower max of their lengths, or give a trace max_context_tokens"
    )


def _verdict_on_disaggregation(
    problem: Problem, result: PlanResult, design: Design, rivals: list[Rival]
) -> str:
    """Whether it pays here, in numbers."""
    other = "disaggregated" if design.kind == "colocated" else "colocated"
    rival = next((item for item in rivals if item.design.kind == other), None)
    if rival is None:
        searched = problem.inputs.search
        if not searched.colocated or not searched.disaggregated:
            return f"{design.kind}; the other kind was not searched"
        if fitted_of(problem.inputs) is not None:
            return f"{design.kind}; colocated workers were not profiled"
        return f"{design.kind}: no {other} design keeps the promises"
    if problem.is_at_rate:
        gain = problem.price(rival.design) / problem.price(design) - 1
    else:
        theirs = problem.value(rival.design, rival.goodput)
        gain = problem.value(design, result.goodput) / theirs - 1 if theirs else float("inf")
    if gain < MIN_GAIN:  # of short traces: a little below 0 is nothing either
        return f"{design.kind} and {other} are equal here: {rival.design.label}"
    pays = "does not pay" if design.kind == "colocated" else "pays"
    beaten = f"the best {other} ({rival.design.label})"
    if problem.is_at_rate:
        need = f"takes {gain:.0%} more {NOUNS[problem.inputs.objective.goal]}"
        return f"disaggregation {pays}: {beaten} {need}"
    return f"disaggregation {pays}: {design.kind} has {gain:.0%} more goodput than {beaten}"


def _with_what_ifs(problem: Problem, evaluator: Evaluator, result: PlanResult) -> PlanResult:
    plain = evaluator if not evaluator.spare_workers else evaluator.with_traffic(problem.traffic)
    asked = Questions(problem, plain, result.design, result.prediction.rate, result.nodes)
    what_ifs = asked.losses() + asked.traffic_changes()
    closed = asked.closed_loop(result.prediction)
    if closed is not None:
        what_ifs.append(closed)
    spare = None if evaluator.spare_workers else spare_plan(problem, plain, result)
    return replace(
        result,
        what_ifs=tuple(what_ifs),
        sensitivity=tuple(asked.sensitivity()),
        curves=(asked.curve(),),
        spare=spare,
    )


def _judge(problem: Problem, choice: Choice, given: Design) -> PlanResult:
    """The design that was asked about, at the asked rate or its own goodput."""
    evaluator = new_evaluator(problem)
    goodput = choice.goodput
    if problem.rate is None:
        goodput = evaluator.goodput(
            given,
            problem.space.estimate(given),
            num_seeds=evaluator.num_seeds,
            tolerance=problem.inputs.search.tolerance,
        )
    own = replace(choice, goodput=goodput, design=given)
    result = _bare_result(problem, evaluator, own, given, problem.rate or goodput.rate)
    if isinstance(result, Unplaceable):
        raise LocalFault(f"design: {result.reason}")
    if not problem.slo:
        return result
    result = _with_what_ifs(problem, evaluator, result)
    planned = tuple(_with_plan(problem, item) for item in result.what_ifs)
    return replace(result, what_ifs=planned)


def _with_plan(problem: Problem, item: WhatIf) -> WhatIf:
    """For traffic that breaks the given design at the asked rate: the plan that is made for it."""
    inputs = problem.inputs
    workload = inputs.workload
    if item.is_kept or problem.rate is None:
        return item
    if item.name.startswith("bursts"):
        workload = workload.changed(cv=BURST_CV)
    elif item.name.startswith("prompt length"):
        workload = workload.changed(prompt_cv=HEAVY_CV)
    else:
        return item
    advice = f"{item.advice}; " if item.advice else ""
    try:
        changed = new_problem(inputs.model_copy(update={"workload": workload}))
        found = choose(changed, new_evaluator(changed)).design
    except LocalFault as error:
        return replace(item, advice=f"{advice}no plan for it: {error.message}")
    if found is None:
        return replace(item, advice=f"{advice}this cluster holds no plan for it")
    cost = f"{gpus_text(found.num_gpus)}, {found.usd_per_hour:.2f} USD/h"
    return replace(item, advice=f"{advice}the plan for it: {found.label} ({cost})")


def _stats(problem: Problem, evaluator: Evaluator, choice: Choice) -> SearchStats:
    tally = choice.contest.tally
    return SearchStats(
        listed=tally.listed,
        pruned_by_bound=tally.by_bound,
        pruned_by_estimate=tally.by_estimate,
        pruned_by_failed_pool=tally.by_blame,
        simulated=tally.simulated,
        num_runs=evaluator.num_runs,
        num_requests=evaluator.num_requests,
        rejected=problem.found.rejected,
    )
