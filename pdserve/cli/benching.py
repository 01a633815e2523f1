"""`pdserve bench`: plan a workload, send it, report."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pdserve.cli.generating import PHASE_LABELS
from pdserve.cli.plain_json import json_text
from pdserve.cli.problems import EXIT_FAILED
from pdserve.cli.status_view import plain_console
from pdserve.cli.tables import titled_table
from pdserve.client.inference import InferenceClient
from pdserve.client.load import only_model, run_load
from pdserve.client.statistics import LoadReport, RequestRecord, Slo, summarise
from pdserve.client.values import Model
from pdserve.client.workload import (
    TraceRequest,
    fit_to_context,
    read_trace,
    scale_time,
    with_poisson_arrivals,
)
from pdserve.config.files import write_file

DEFAULT_RATE = 2.0
SHARE_CHARS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to send. A trace gives lengths; it gives times too unless `rate` is set."""

    model: str = ""
    rate: float | None = None
    trace: str | None = None
    time_scale: float = 1.0
    num_requests: int = 60
    prompt_tokens: int = 128
    output_tokens: int = 32
    slo: Slo = field(default_factory=Slo)
    slo_class: str = ""
    timeout_s: float = 120.0
    seed: int = 0


async def run_bench(
    address: str, plan: Plan, json_file: Path | None, *, as_json: bool = False
) -> int:
    """Run, print the report and write `json_file`; 1 where no request was answered."""
    if json_file is not None:
        _write_json(json_file, {})  # a path that cannot be written is told before the run
    report, model = await measure(address, plan)
    content = report_as_json(report, plan, model)
    if json_file is not None:
        _write_json(json_file, content)
    if as_json:
        print(json_text(content))
    else:
        console = plain_console()
        for table in render_report(report):
            console.print(table)
    return 0 if report.num_ok else EXIT_FAILED


async def measure(address: str, plan: Plan) -> tuple[LoadReport, Model]:
    """Send the planned requests, fitted to the served model, with a progress bar on stderr."""
    requests = lengths(plan)  # a bad trace is told before the cluster is asked anything
    async with InferenceClient(address) as client:
        model = await only_model(client, plan.model)
    # Fitted whole: the lengths do not depend on how much of a trace is sent.
    fitted = with_arrivals(plan, fit_to_context(requests, model.max_context_tokens))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("requests", total=len(fitted))

        def advance(record: RequestRecord) -> None:
            progress.advance(task)

        records, duration_s = await run_load(
            address,
            model,
            fitted,
            seed=plan.seed,
            timeout_s=plan.timeout_s,
            slo_class=plan.slo_class,
            progress=advance,
        )
    return summarise(records, plan.slo, duration_s), model


def render_report(report: LoadReport) -> list[Table]:
    """Latencies, then totals and failures, then where the time went."""
    return [_latency_table(report), _total_table(report), _phase_table(report)]


def report_as_json(report: LoadReport, plan: Plan, model: Model) -> dict[str, object]:
    """Everything, with each request's record."""
    return {
        "plan": dataclasses.asdict(plan),
        "model": dataclasses.asdict(model),
        **dataclasses.asdict(report),
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_file(path, json_text(content, indent=1) + "\n")


def lengths(plan: Plan) -> tuple[TraceRequest, ...]:
    """The whole trace, or as many requests of one length as are planned."""
    if plan.trace is not None:
        return read_trace(plan.trace)
    return (TraceRequest(0.0, plan.prompt_tokens, plan.output_tokens),) * plan.num_requests


def with_arrivals(plan: Plan, requests: Sequence[TraceRequest]) -> tuple[TraceRequest, ...]:
    """The first of `requests` at their own times, or, at a rate, any of them as they are drawn.

    The beginning of a trace is not like the whole: a rate is a question about the whole.
    """
    if plan.trace is not None and plan.rate is None:
        return scale_time(requests[: plan.num_requests], plan.time_scale)
    drawn = Random(plan.seed).choices(requests, k=plan.num_requests)
    return with_poisson_arrivals(drawn, rate=plan.rate or DEFAULT_RATE, seed=plan.seed)


def _latency_table(report: LoadReport) -> Table:
    table = titled_table("latency", "", "p50", "p90", "p99", "objective")
    rows: tuple[tuple[str, Mapping[int, float], float | None], ...] = (
        ("TTFT (first token)", report.ttft_s, report.slo.ttft_s),
        ("TPOT (each later token)", report.tpot_s, report.slo.tpot_s),
        ("E2E (whole answer)", report.e2e_s, None),
        ("KV transfer (overlaps)", report.transfer_s, None),
        ("sent late (this program)", report.late_s, None),
    )
    for name, percentiles, limit in rows:
        cells = [_ms(percentiles[percent]) for percent in (50, 90, 99)]
        table.add_row(name, *cells, _ms(limit) if limit is not None else "")
    return table


def _total_table(report: LoadReport) -> Table:
    table = Table(box=box.SIMPLE, title="requests", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("sent", str(report.num_requests))
    table.add_row("answered", str(report.num_ok))
    for reason, count in report.failures.items():
        table.add_row(f"failed: {reason}", str(count))
    table.add_row("duration", f"{report.duration_s:.1f} s")
    table.add_row("answered/s", f"{report.requests_per_s:.2f}")
    table.add_row("output tokens/s", f"{report.output_tokens_per_s:.1f}")
    if report.slo != Slo():
        table.add_row("met every objective", f"{report.attainment:.1%}")
        table.add_row("goodput (met/s)", f"{report.goodput:.2f}")
    table.add_row("KV moved", f"{report.transferred_bytes:,} bytes")
    return table


def _phase_table(report: LoadReport) -> Table:
    table = Table(
        box=box.SIMPLE, title="share of the requests' time", title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, share in report.phase_share.items():
        label = PHASE_LABELS.get(name, "other")
        table.add_row(label, f"{share:.1%}", "█" * round(share * SHARE_CHARS))
    return table


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:,.1f} ms"
