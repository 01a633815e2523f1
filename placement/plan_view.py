"""Running the plan commands: progress, the tables in the terminal, JSON and the plan file."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pdserve.cli.tables import titled_table
from pdserve.client.workload import PACKAGED_TRACES
from pdserve.config.base import read_yaml
from pdserve.config.files import write_file
from pdserve.domain.errors import LocalFault
from placement.plan import Plan, format_plan, parse_plan, plan_of
from placement.plan_inputs import PlanInputs, parse_inputs, read_inputs
from placement.plan_report import add_curves, write_plan_report
from placement.search.designs import gpus_text
from placement.search.results import NoPlan, PlanResult, Prediction, Rival, WhatIf
from placement.solver import Progress, solve

EXIT_NO_PLAN = 1
QUIET_S = 1.0
REDRAW_S = 0.1
MIN_WIDTH = 100


def run_plan(
    inputs_file: Path,
    *,
    output: Path | None,
    json_file: Path | None,
    as_json: bool = False,
    report: Path | None = None,
    what_ifs: bool,
) -> int:
    """Plan, print, write; the exit code."""
    for path in (output, json_file, report):
        _check_writable(path)
    inputs = _located(read_inputs(inputs_file), inputs_file)
    if not what_ifs:
        search = inputs.search.model_copy(update={"what_ifs": False})
        inputs = inputs.model_copy(update={"search": search})
    with progress_line() as progress:
        result = solve(inputs, progress)
        content = result.to_json()
        if report is not None and isinstance(result, PlanResult):
            content = add_curves(inputs, result, content, progress)
            write_plan_report(report, content)
    text = json.dumps(content, indent=1)
    if json_file is not None:
        write_file(json_file, text + "\n")
    if as_json:
        print(text)
    elif isinstance(result, NoPlan):
        _show_no_plan(result)
    else:
        show(result, new_console())
    if isinstance(result, NoPlan):
        return EXIT_NO_PLAN
    if output is not None:
        write_file(output, format_plan(plan_of(result)))
    return 0


def run_compare(first: Path, second: Path, *, as_json: bool) -> int:
    """Print two plans beside each other; 1 where one of them does not exist."""
    plans = []
    for path in (first, second):
        plan = _plan_from(path)
        if plan is None:
            return EXIT_NO_PLAN
        plans.append(plan)
    if as_json:
        records = [
            {"file": str(path), **plan.model_dump(mode="json")}
            for path, plan in zip((first, second), plans, strict=True)
        ]
        print(json.dumps(records, indent=1))
        return 0
    table = Table(box=box.SIMPLE)
    for name in ("", str(first), str(second), "change"):
        table.add_column(name, overflow="fold", justify="left" if name == "" else "right")
    left, right = (_facts(plan) for plan in plans)
    for name in left:
        a, b = left[name], right[name]
        is_number = isinstance(a, float) and isinstance(b, float) and a
        change = f"{b / a - 1:+.1%}" if is_number else ""
        table.add_row(name, _text(a), _text(b), change)
    new_console().print(table)
    return 0


def _plan_from(path: Path) -> Plan | None:
    data = read_yaml(path)
    if isinstance(data, dict) and "version" in data:
        return parse_plan(data, source=str(path))
    with progress_line() as progress:
        result = solve(_located(parse_inputs(data, source=str(path)), path), progress)
    if isinstance(result, NoPlan):
        _show_no_plan(result, prefix=f"{path}: ")
        return None
    return plan_of(result)


def _facts(plan: Plan) -> dict[str, Any]:
    pools = " + ".join(
        f"{p.replicas} {p.role} {p.gpu} TP{p.tp}"
        + (f" PP{p.pp}" if p.pp > 1 else "")
        + (f" EP{p.ep}" if p.ep > 1 else "")
        for p in plan.pools
    )
    seen = plan.prediction
    facts: dict[str, Any] = {
        "model": plan.model,
        "pools": pools + (f", {plan.cells} cells" if plan.cells > 1 else ""),
        "GPUs": float(plan.num_gpus),
        "rate, requests/s": seen.rate,
        "attainment": seen.attainment,
        "attainment, interval of 95 %": "{:.4g} to {:.4g}".format(*seen.attainment_interval),
        "goodput, requests/s": seen.goodput,
        "goodput per GPU": seen.goodput_per_gpu,
        "USD/h": seen.usd_per_hour,
        "USD per million tokens": seen.usd_per_million_tokens,
        "watts": seen.watts,
        "tokens in a step": float(plan.limits.max_step_tokens),
        "requests in a batch": float(plan.limits.max_num_requests),
    }
    for name, values in (("TTFT", seen.ttft_s), ("TPOT", seen.tpot_s)):
        for percentile in ("p50", "p90", "p99"):
            facts[f"{name} {percentile}, ms"] = values.get(percentile, float("nan")) * 1e3
    facts |= {
        "simulated": f"{seen.num_seeds} traces of {seen.horizon_s:.4g} s",
        "step times from": ", ".join(plan.sources),
        "error of step times": seen.step_time_error,
    }
    return facts


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _located(inputs: PlanInputs, path: Path) -> PlanInputs:
    """File names in the inputs are relative to their folder; packaged traces have no folder."""
    folder = path.parent
    update: dict[str, object] = {}
    named = inputs.workload.trace
    if named is not None and (named not in PACKAGED_TRACES or (folder / named).exists()):
        trace = str(folder / named)
        update["workload"] = inputs.workload.model_copy(update={"trace": trace})
    if inputs.cluster.gpus_file is not None:
        gpus = str(folder / inputs.cluster.gpus_file)
        update["cluster"] = inputs.cluster.model_copy(update={"gpus_file": gpus})
    latency = inputs.latency
    if latency is not None and latency.profile and (folder / latency.profile).exists():
        profile = str(folder / latency.profile)
        update["latency"] = latency.model_copy(update={"profile": profile})
    is_path = "/" in inputs.model or inputs.model.endswith(".json")
    if is_path and (folder / inputs.model).exists():
        update["model"] = str(folder / inputs.model)
    return inputs.model_copy(update=update) if update else inputs


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise LocalFault(f"{path}: not a file that can be written")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise LocalFault(f"{path}: not writable")


@contextmanager
def progress_line() -> Iterator[Progress]:
    """A line on a terminal's stderr after the first second."""
    start_s = time.monotonic()
    drawn_s = [0.0]
    is_terminal = sys.stderr.isatty()

    def progress(stage: str, num_runs: int) -> None:
        now_s = time.monotonic()
        if not is_terminal or now_s - start_s < QUIET_S or now_s - drawn_s[0] < REDRAW_S:
            return
        drawn_s[0] = now_s
        print(
            f"\r{stage}: {num_runs} simulations, {now_s - start_s:.0f} s\x1b[K",
            end="",
            file=sys.stderr,
            flush=True,
        )

    try:
        yield progress
    finally:
        if drawn_s[0]:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def new_console() -> Console:
    width = None if sys.stdout.isatty() else MIN_WIDTH + 20
    return Console(highlight=False, width=width)


def _show_no_plan(result: NoPlan, prefix: str = "") -> None:
    print(f"{prefix}no plan: {result.reason}", file=sys.stderr)
    for line in result.nearest:
        print(f"  nearest {line}", file=sys.stderr)


def show(result: PlanResult, console: Console) -> None:
    """All tables of an answer."""
    design, cells = result.design, result.num_cells
    copies = f"{cells} x " if cells > 1 else ""
    console.print(f"plan: {copies}{design.label} ({gpus_text(design.num_gpus * cells)})")
    console.print(result.disaggregation)
    for note in result.notes:
        console.print(f"note: {note}")
    console.print(_pools_table(result))
    console.print(_prediction_table(result))
    if result.prediction.slowdowns:
        console.print(_slowdown_table(result.prediction))
    console.print(_economy_table(result))
    if result.neighbours or result.runner_ups or result.spare:
        console.print(_rivals_table(result))
    console.print(f"one GPU more: {result.one_gpu_more}")
    changes = (*result.what_ifs, *result.sensitivity)
    if changes:
        console.print(_what_if_table("what if", changes))
    if result.corrected is not None:
        fixed = result.corrected
        console.print(f"{fixed.what}: {fixed.design.label}; {fixed.why_not}")
    if result.judged is not None:
        _show_judged(result.judged, console)
    stats = result.stats
    console.print(
        f"searched: {stats.listed} candidates; dropped by bounds {stats.pruned_by_bound}, by "
        f"estimates {stats.pruned_by_estimate}, by a pool that failed elsewhere "
        f"{stats.pruned_by_failed_pool}; simulated {stats.simulated} "
        f"({stats.num_runs} runs, {stats.num_requests} requests)"
    )


def _show_judged(judged: PlanResult, console: Console) -> None:
    seen = judged.prediction
    low, high = seen.interval
    console.print(
        f"the design that was asked about: {judged.design.label} "
        f"({gpus_text(judged.design.num_gpus)}, "
        f"{judged.economy.usd_per_hour:.2f} USD/h) at {judged.total_rate:.4g} requests/s: "
        f"attainment {seen.attainment:.1%} [{low:.1%}, {high:.1%}], "
        + ("keeps" if seen.is_kept else "misses")
        + f" its promises; {seen.binds} gives way first"
    )
    changes = (*judged.what_ifs, *judged.sensitivity)
    if changes:
        console.print(_what_if_table("the asked design, what if", changes))


def _pools_table(result: PlanResult) -> Table:
    table = titled_table("pools", "worker", "replicas", "GPUs", "busy", "KV tokens each", "nodes")
    for worker, count in result.design.counts:
        busy = result.prediction.utilisation.get(worker.label, 0.0)
        nodes = sum(
            1
            for node in result.nodes
            if any(name.startswith(worker.label) for name in node["workers"])
        )
        table.add_row(
            worker.label,
            str(count * result.num_cells),
            str(count * worker.num_gpus * result.num_cells),
            f"{busy:.0%}",
            f"{worker.pool.kv_tokens:,}",
            str(nodes * result.num_cells),
        )
    return table


def _prediction_table(result: PlanResult) -> Table:
    seen = result.prediction
    table = titled_table(
        f"prediction at {result.total_rate:.4g} requests/s ({seen.num_seeds} traces of "
        f"{seen.horizon_s:g} s; {seen.verdict})",
        "class",
        "attainment",
        "95 % interval",
        "target",
        "TTFT p50/p90/p99 (promise), ms",
        "TPOT p50/p90/p99 (promise), ms",
    )
    for item in seen.classes:
        low, high = item.interval
        ttft, tpot = (_percentiles(seen, item.percentiles, name) for name in ("ttft_s", "tpot_s"))
        table.add_row(
            item.name,
            f"{item.attainment:.1%}",
            f"{low:.1%} - {high:.1%}",
            f"{item.target:.0%}",
            f"{ttft} ({item.ttft_s * 1e3:g})",
            f"{tpot} ({item.tpot_s * 1e3:g})",
        )
    if not seen.classes:
        ttft, tpot = (_percentiles(seen, seen.percentiles, name) for name in ("ttft_s", "tpot_s"))
        table.add_row("all", "kept" if seen.is_kept else "missed", "", "", ttft, tpot)
    return table


def _slowdown_table(seen: Prediction) -> Table:
    """Splitwise's nine limits: times over those of one A100 machine alone."""
    table = titled_table("slowdown against one A100 machine alone (limit)", "", "p50", "p90", "p99")
    cells = {item.name: f"{item.value:.3g} ({item.limit:g})" for item in seen.slowdowns}
    for name in ("TTFT", "TBT", "E2E"):
        table.add_row(name, *(cells[f"{name} {column}"] for column in ("p50", "p90", "p99")))
    return table


def _percentiles(
    seen: Prediction, percentiles: dict[str, dict[str, float]] | None, measure: str
) -> str:
    if percentiles is None:
        return seen.verdict
    values = percentiles[measure]
    return " / ".join(f"{values[name] * 1e3:.3g}" for name in ("p50", "p90", "p99"))


def _economy_table(result: PlanResult) -> Table:
    table = titled_table(
        "for it",
        "goodput/s",
        "95 % interval",
        "per GPU",
        "USD/h",
        "USD/1M tokens",
        "watts",
        "bottleneck",
        "binds",
    )
    cells = result.num_cells
    low, high = result.goodput_interval
    interval = f"{low * cells:.4g} - {high * cells:.4g}" if high > 0 else ""
    table.add_row(
        f"{result.total_goodput:.4g}",
        interval,
        f"{result.goodput / result.design.num_gpus:.3f}",
        f"{result.economy.usd_per_hour * cells:.2f}",
        f"{result.economy.usd_per_million_tokens:.3f}",
        f"{result.economy.watts * cells:.0f}",
        result.prediction.bottleneck,
        result.prediction.binds,
    )
    return table


def _rivals_table(result: PlanResult) -> Table:
    table = titled_table("why not", "design", "goodput/s", "per GPU", "USD/h", "because")
    rivals: list[Rival] = [*result.neighbours, *result.runner_ups]
    if result.spare is not None:
        rivals.append(result.spare)
    for rival in rivals:
        table.add_row(
            rival.what if rival in result.neighbours else f"{rival.design.label}",
            f"{rival.goodput * result.num_cells:.4g}",
            f"{rival.goodput_per_gpu:.3f}",
            f"{rival.usd_per_hour * result.num_cells:.2f}",
            rival.why_not if rival is not result.spare else f"{rival.what}: {rival.why_not}",
        )
    return table


def _what_if_table(title: str, changes: tuple[WhatIf, ...]) -> Table:
    table = titled_table(
        title, "change", "attainment", "", "TTFT p90, ms", "TPOT p90, ms", "to keep it"
    )
    for item in changes:
        table.add_row(
            item.name,
            f"{item.attainment:.1%}",
            "kept" if item.is_kept else "missed",
            item.verdict if item.ttft_p90_s is None else f"{item.ttft_p90_s * 1e3:.3g}",
            item.verdict if item.tpot_p90_s is None else f"{item.tpot_p90_s * 1e3:.3g}",
            item.advice,
        )
    return table
