"""What is in a trace as one page: lengths, arrivals over time, and the figures of `describe`."""

from pathlib import Path
from typing import Any

import numpy as np

from pdserve.config.files import write_file
from placement.demand import Floats, Ints, Workload
from placement.report_parts.figures import COLOURS, PageFigure
from placement.report_parts.page import ReportTable, make_page
from placement.simulation.summary import clean
from placement.workload_stats import LENGTH_NAMES, WorkloadStats, histogram

NUM_BINS = 40
MAX_SPANS = 120


def write_workload_report(path: Path, workload: Workload, stats: WorkloadStats) -> None:
    """Write the page; raises `LocalFault` where the path cannot be written."""
    write_file(path, workload_page(workload, stats))


def workload_page(workload: Workload, stats: WorkloadStats) -> str:
    """HTML that needs nothing else; the statistics are in it as JSON, element `data`."""
    arrivals = stats.arrivals
    unit = "requests/s" if arrivals.is_recorded else "requests per mean gap"
    lines = [
        f"{stats.num_requests:,} requests; {arrivals.rate:.3g} {unit}, "
        f"gap CV {arrivals.gap_cv:.2f}, peak minute {arrivals.peak_minute_ratio:.2f} x the mean",
        *workload.notes,
    ]
    rows = [(name, *cells) for name, cells in stats.length_rows()]
    return make_page(
        title=f"Workload {Path(workload.source).name}",
        lines=lines,
        tables=[ReportTable("Lengths, tokens", ("", *LENGTH_NAMES), rows)],
        figures=(
            _length_figure("prompt", workload.prompt_tokens),
            _length_figure("output", workload.output_tokens),
            _arrival_figure(workload, arrivals.is_recorded),
        ),
        content=clean(stats.to_json()),
    )


def _length_figure(name: str, values: Ints) -> PageFigure:
    bins = histogram(values, num_bins=NUM_BINS)
    labels = [f"{low:,.0f} - {high:,.0f}" for low, high, _ in bins]
    counts = [count for _, _, count in bins]
    return PageFigure(
        name=f"{name}_tokens",
        title=f"{name.capitalize()} tokens",
        about="Requests by length; the widths of the bins grow with it.",
        header=("tokens", "requests"),
        rows=tuple((label, str(count)) for label, count in zip(labels, counts, strict=True)),
        plot=_bars(labels, counts, "tokens", "requests"),
    )


def _arrival_figure(workload: Workload, is_recorded: bool) -> PageFigure:
    arrival_s = _arrival_s(workload)
    edges = np.linspace(0.0, max(float(arrival_s[-1]), 1e-9), _num_spans(arrival_s) + 1)
    counts, _ = np.histogram(arrival_s, edges)
    span = float(edges[1] - edges[0])
    rates = [float(f"{count / span:.6g}") for count in counts]
    starts = [float(f"{edge:.6g}") for edge in edges[:-1]]
    unit = "s" if is_recorded else "mean gaps"
    return PageFigure(
        name="timeline",
        title="Arrivals",
        about=f"Requests for each {unit.removesuffix('s') or 's'}, means over {span:.3g} {unit}.",
        header=(f"from, {unit}", "requests", "rate"),
        rows=tuple(
            (f"{start:g}", str(int(count)), f"{rate:g}")
            for start, count, rate in zip(starts, counts, rates, strict=True)
        ),
        plot=_bars(starts, rates, f"time, {unit}", "rate"),
    )


def _arrival_s(workload: Workload) -> Floats:
    times = workload.arrival_s
    if times is None:
        times = np.cumsum(workload.gaps())
    shifted: Floats = times - times[0]
    return shifted


def _num_spans(arrival_s: Floats) -> int:
    """A minute each, where that is not too many; at least ten."""
    minutes = int(float(arrival_s[-1]) // 60)
    return min(max(minutes, 10), MAX_SPANS)


def _bars(x: list[Any], y: list[Any], x_title: str, y_title: str) -> dict[str, Any]:
    return {
        "data": [{"type": "bar", "x": x, "y": y, "marker": {"color": COLOURS[0]}}],
        "layout": {
            "xaxis": {"title": {"text": x_title}},
            "yaxis": {"title": {"text": y_title}},
            "bargap": 0.05,
        },
    }
