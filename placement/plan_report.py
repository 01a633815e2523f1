"""`pdserve plan --report`: the curves of an answer, and the page made of its JSON."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pdserve.config.files import write_file
from placement.demand import Workload
from placement.plan_inputs import PlanInputs
from placement.report import CURVES, render_report
from placement.report_parts.curves import (
    AttainmentCurve,
    Candidate,
    CostPoint,
    Curves,
    Timeline,
    TradeOff,
    attainment_curve,
    cheapest_at,
    replay_hour,
    trade_offs,
)
from placement.report_parts.figures import percent
from placement.report_parts.page import ReportTable
from placement.search.choose import new_evaluator
from placement.search.designs import Design, Worker
from placement.search.problem import Problem, new_problem
from placement.search.results import PlanResult
from placement.simulation.values import SimulationConfig

HOUR_S = 3600.0
MAX_HOUR_REQUESTS = 300_000
MAX_CURVE_REQUESTS = 9000
MIN_CURVE_REQUESTS = 500
COST_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
MAX_DESIGNS = 40
LARGE_MS = 100.0

Configure = Callable[[Design], SimulationConfig]
Progress = Callable[[str, int], None]


def add_curves(
    inputs: PlanInputs,
    result: PlanResult,
    content: Mapping[str, Any],
    progress: Progress = lambda stage, num_runs: None,
) -> dict[str, Any]:
    """`content`, which is the result's JSON, with the curves of a report; seconds to simulate."""
    return {**content, CURVES: plan_curves(inputs, result, progress).to_json()}


def write_plan_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of what `add_curves` gave; raises `LocalFault` where that cannot be."""
    write_file(path, plan_page(content))


def plan_curves(inputs: PlanInputs, result: PlanResult, progress: Progress) -> Curves:
    """Simulate what the figures show, on the plan's own traffic; rates are of the whole cluster."""
    problem = new_problem(inputs)
    configure = new_evaluator(problem).config
    rate = result.prediction.rate
    curve_s = inputs.search.duration_s
    short_num = min(max(rate * curve_s, MIN_CURVE_REQUESTS), MAX_CURVE_REQUESTS)
    short = _workload(problem, short_num)
    hour = _workload(problem, min(rate * HOUR_S * 1.02, MAX_HOUR_REQUESTS))
    config = configure(result.design)
    progress("drawing the trade-offs", 0)
    points = trade_offs(_rivals(result, configure), short, rate)
    progress("replaying an hour", 0)
    curves = Curves(slo=problem.slo, trade_offs=points, timeline=replay_hour(config, hour, rate))
    if problem.slo:
        progress("drawing attainment", 0)
        attainment = attainment_curve(config, short, rate)
        family = _Family(result.design, configure, problem.space.fits)
        cost = []
        for share in COST_SHARES:
            progress("drawing cost", 0)
            cost.append(cheapest_at(rate * share, list(family.near(share)), short))
        curves = replace(curves, attainment=attainment, cost=tuple(cost))
    return _scaled(curves, result.num_cells) if result.num_cells > 1 else curves


def _workload(problem: Problem, num: float) -> Workload:
    """The first requests of the plan's own traffic, with unit gaps."""
    trace, classes = problem.traffic.trace(0, 1.0, num)
    return Workload(
        prompt_tokens=trace.prompts,
        output_tokens=trace.outputs,
        unit_gaps=np.diff(trace.arrival_s, prepend=0.0),
        prefix_starts=trace.prefix_starts,
        prefix_ids=trace.prefix_ids,
        prefix_block_tokens=trace.prefix_block_tokens,
        class_index=classes if problem.slo else None,
    )


def plan_page(content: Mapping[str, Any]) -> str:
    """The page, made of the JSON and of nothing else."""
    design, cells = content["design"], content["num_cells"]
    copies = f"{cells} x " if cells > 1 else ""
    title = f"{content['inputs']['model']}: {copies}{design['label']}"
    seen = content["prediction"]
    lines = [
        f"{design['num_gpus'] * cells} GPUs, ${content['economy']['usd_per_hour'] * cells:,.2f}/h. "
        f"{content['disaggregation']}",
        f"Step times: {', '.join(content['sources'])}, error {content['relative_error']:.0%}; "
        f"simulated for {seen['horizon_s']:g} s on {seen['num_seeds']} traces: {seen['verdict']}.",
        *content["notes"],
    ]
    if content.get("one_gpu_more"):
        lines.append(f"One GPU more: {content['one_gpu_more']}")
    tables = [_pool_table(content), _prediction_table(content), _economy_table(content)]
    tables += _rival_tables(content) + _what_if_tables(content)
    return render_report(content, title=title, lines=lines, tables=tables)


@dataclass(frozen=True, slots=True)
class _Family:
    """Designs of the plan's kinds of worker, in other numbers."""

    design: Design
    config: Configure
    fits: Callable[[Design], bool]

    def near(self, share: float) -> Iterator[Candidate]:
        """Numbers around `share` of the plan's that fit the cluster."""
        ranges = [self._counts(worker, count * share) for worker, count in self.design.counts]
        for combination in list(product(*ranges))[:MAX_DESIGNS]:
            design = replace(self.design, counts=Design.of(dict(combination)).counts)
            if design.is_complete and self.fits(design):
                yield _candidate(design, self.config)

    @staticmethod
    def _counts(worker: Worker, wanted: float) -> Sequence[tuple[Worker, int]]:
        middle = math.ceil(wanted)
        return [(worker, count) for count in range(max(middle - 1, 1), middle + 2)]


def _rivals(result: PlanResult, config: Configure) -> list[Candidate]:
    """The plan and whatever was compared with it, each once."""
    designs = [rival.design for rival in (*result.runner_ups, *result.neighbours)]
    if result.spare is not None:
        designs.append(result.spare.design)
    if result.judged is not None:
        designs.append(result.judged.design)
    others = [design for design in dict.fromkeys(designs) if design != result.design]
    plan = replace(_candidate(result.design, config), is_chosen=True)
    complete = (design for design in others if design.is_complete)
    return [plan, *(_candidate(design, config) for design in complete)]


def _candidate(design: Design, config: Configure) -> Candidate:
    return Candidate(label=design.label, config=config(design), usd_per_hour=design.usd_per_hour)


def _scaled(curves: Curves, cells: int) -> Curves:
    """From one cell to the cluster: rates and costs add up, times and shares do not."""

    def attainment(curve: AttainmentCurve) -> AttainmentCurve:
        rates = tuple(rate * cells for rate in curve.rates)
        return replace(curve, rates=rates, planned_rate=curve.planned_rate * cells)

    def cost(point: CostPoint) -> CostPoint:
        usd = point.usd_per_hour
        return replace(
            point,
            rate=point.rate * cells,
            usd_per_hour=None if usd is None else usd * cells,
            label=f"{cells} x ({point.label})",
        )

    def trade_off(point: TradeOff) -> TradeOff:
        return replace(
            point,
            usd_per_hour=point.usd_per_hour * cells,
            num_gpus=point.num_gpus * cells,
            label=f"{cells} x ({point.label})",
        )

    def timeline(line: Timeline) -> Timeline:
        return replace(line, rate=tuple(rate * cells for rate in line.rate))

    return replace(
        curves,
        attainment=attainment(curves.attainment) if curves.attainment else None,
        cost=tuple(map(cost, curves.cost)),
        trade_offs=tuple(map(trade_off, curves.trade_offs)),
        timeline=timeline(curves.timeline) if curves.timeline else None,
    )


def _pool_table(content: Mapping[str, Any]) -> ReportTable:
    cells = content["num_cells"]
    rows = [
        (
            pool["role"],
            pool["gpu"],
            str(pool["replicas"] * cells),
            str(pool["tp"]),
            str(pool["pp"]),
            str(pool["ep"]),
            str(pool["replicas"] * cells * pool["tp"] * pool["pp"]),
        )
        for pool in content["design"]["pools"]
    ]
    header = ("pool", "GPU", "replicas", "TP", "PP", "EP", "GPUs")
    return ReportTable("Pools", header, rows)


def _prediction_table(content: Mapping[str, Any]) -> ReportTable:
    seen = content["prediction"]
    rows = []
    for item in seen["classes"]:
        low, high = item["interval"]
        rows.append(
            (
                item["name"],
                f"{item['attainment']:.1%}",
                f"{percent(low)} to {percent(high)}",
                f"{item['target']:.0%}",
                *_percentiles(seen, "ttft_s"),
                f"{item['ttft_s'] * 1e3:g}",
                *_percentiles(seen, "tpot_s"),
                f"{item['tpot_s'] * 1e3:g}",
            )
        )
    if not rows:
        parts = (*_percentiles(seen, "ttft_s"), "", *_percentiles(seen, "tpot_s"), "")
        rows.append(("all", "kept" if seen["is_kept"] else "missed", "", "", *parts))
    times = [(f"{name} p50, ms", "p90", "p99", "promise") for name in ("TTFT", "TPOT")]
    header = ("class", "attainment", "95 % interval", "target", *times[0], *times[1])
    rate = seen["rate"] * content["num_cells"]
    return ReportTable(f"Prediction at {rate:.4g} requests/s", header, rows)


def _economy_table(content: Mapping[str, Any]) -> ReportTable:
    cells, economy = content["num_cells"], content["economy"]
    seen = content["prediction"]
    row = (
        f"{content['goodput'] * cells:.4g}",
        f"{content['goodput'] / content['design']['num_gpus']:.3f}",
        f"{economy['usd_per_hour'] * cells:,.2f}",
        f"{economy['usd_per_million_tokens']:.3f}",
        f"{economy['watts'] * cells:,.0f}",
        seen["bottleneck"],
        seen["binds"],
    )
    header = ("goodput/s", "per GPU", "$/h", "$/1M tokens", "watts", "bottleneck", "binds")
    return ReportTable("What it gives and costs", header, [row])


def _rival_tables(content: Mapping[str, Any]) -> list[ReportTable]:
    cells = content["num_cells"]
    named = [(each["what"], each) for each in content["neighbours"]]
    named += [(each["design"]["label"], each) for each in content["runner_ups"]]
    for key in ("spare", "corrected"):
        if (other := content.get(key)) is not None:
            why = ": ".join(text for text in (other["what"], other["why_not"]) if text)
            named.append((other["design"]["label"], {**other, "why_not": why}))
    rows = [
        (
            name,
            f"{each['goodput'] * cells:.4g}",
            f"{each['goodput_per_gpu']:.3f}",
            f"{each['usd_per_hour'] * cells:,.2f}",
            each["why_not"],
        )
        for name, each in named
    ]
    header = ("design", "goodput/s", "per GPU", "$/h", "because")
    return [ReportTable("Why not", header, rows)] if rows else []


def _what_if_tables(content: Mapping[str, Any]) -> list[ReportTable]:
    rows = [
        (
            each["name"],
            percent(each["attainment"]),
            "kept" if each["is_kept"] else "missed",
            _ms(each["ttft_p90_s"], each["verdict"]),
            _ms(each["tpot_p90_s"], each["verdict"]),
            each["advice"],
        )
        for each in (*content["what_ifs"], *content["sensitivity"])
    ]
    header = ("change", "attainment", "promise", "TTFT p90, ms", "TPOT p90, ms", "to keep it")
    return [ReportTable("What if", header, rows)] if rows else []


def _percentiles(seen: Mapping[str, Any], measure: str) -> tuple[str, str, str]:
    if seen["percentiles"] is None:
        return (seen["verdict"], "", "")
    values = seen["percentiles"][measure]
    p50, p90, p99 = (_ms(values[name], "-") for name in ("p50", "p90", "p99"))
    return p50, p90, p99


def _ms(seconds: float | None, otherwise: str) -> str:
    if seconds is None:
        return otherwise
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= LARGE_MS else f"{ms:.3g}"
