"""What `pdserve workload` prints and writes."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from pdserve.config.base import Settings, parse_settings, read_yaml
from placement.demand import ArrivalProcess, Ints, Lengths, SharedPrefix, WorkloadSpec
from placement.simulation.settings import check_parts
from placement.simulation.summary import clean
from placement.workload_files import format_workload, read_workload
from placement.workload_stats import LENGTH_NAMES, WorkloadStats, describe, fit, histogram

SPEC_EXAMPLE = """\
# A workload as distributions: pdserve workload generate spec.yaml -o w.csv
num_requests: 1000
arrivals:
  rate: 4.0                 # requests/s, the mean over the whole time
  cv: 1.0                   # of the gaps: 1 Poisson, 0 regular, 2 bursty
  diurnal: []               # relative rates over one period, such as [1, 0.5, 2, 3]
  period_s: 86400
prompt_tokens: {distribution: lognormal, mean: 1000, cv: 1.0, min: 1, max: 16000}
output_tokens: {distribution: gamma, mean: 200, cv: 0.8, min: 1, max: 2000}
# prefix: {share: 0.5, tokens: 1024, groups: 4}   # prompts that begin alike
seed: 0
"""
PARTS: Mapping[str, type[Settings]] = {
    "arrivals": ArrivalProcess,
    "prompt_tokens": Lengths,
    "output_tokens": Lengths,
    "prefix": SharedPrefix,
}
BAR_WIDTH = 40


def show_workload(file: Path, *, as_json: bool, report: Path | None = None) -> None:
    """Print statistics as tables and histograms, or as JSON; write a page where one is wanted."""
    workload = read_workload(file)
    stats = describe(workload)
    if report is not None:
        from placement.workload_report import write_workload_report

        write_workload_report(report, workload, stats)
    if as_json:
        print(json.dumps(clean(stats.to_json()), indent=2, allow_nan=False))
        return
    console = Console()
    console.print(_length_table(stats))
    console.print(_arrival_lines(stats))
    for note in workload.notes:
        console.print(f"note: {note}")
    for name, values in (
        ("prompt tokens", workload.prompt_tokens),
        ("output tokens", workload.output_tokens),
    ):
        console.print(f"\n{name}")
        console.print(_histogram_lines(values), highlight=False)


def fit_to_yaml(file: Path, *, num_requests: int | None, seed: int) -> str:
    """Distributions that fit a trace, as YAML for `generate_csv`."""
    spec = fit(read_workload(file), num_requests=num_requests, seed=seed)
    data = spec.model_dump(exclude_none=True, exclude={"arrivals": {"diurnal", "period_s"}})
    return f"# Fitted to {file.name}\n" + yaml.safe_dump(data, sort_keys=False)


def generate_csv(file: Path, *, seed: int | None) -> str:
    """Draw the workload that a YAML file describes, as our CSV."""
    data = read_yaml(file)
    source = str(file)
    if isinstance(data, dict):
        check_parts(data, PARTS, f"{source}: ")
    spec = parse_settings(WorkloadSpec, data, source=source)
    return format_workload(spec.generate(seed))


def _length_table(stats: WorkloadStats) -> Table:
    table = Table(title=f"{stats.num_requests} requests", title_justify="left")
    table.add_column("tokens")
    for name in LENGTH_NAMES:
        table.add_column(name, justify="right")
    for name, cells in stats.length_rows():
        table.add_row(name, *cells)
    return table


def _arrival_lines(stats: WorkloadStats) -> str:
    arrivals = stats.arrivals
    unit, per = ("s", "requests/s") if arrivals.is_recorded else ("mean gaps", "per mean gap")
    windows = ", ".join(f"{name} {value:.1f}" for name, value in arrivals.dispersion.items())
    lines = [
        f"arrivals    {arrivals.rate:.2f} {per} over {arrivals.duration_s:,.1f} {unit}; "
        f"gap CV {arrivals.gap_cv:.2f}, longest gap {arrivals.longest_gap_s:.1f}",
        f"burstiness  peak minute {arrivals.peak_minute_ratio:.2f} x mean; "
        f"variance / mean of counts: {windows}",
        f"lengths     prompt : output {stats.prompt_to_output:.1f} : 1; "
        f"correlation {stats.correlation:+.2f}",
    ]
    if stats.prefix is not None:
        prefix = stats.prefix
        lines.append(
            f"prefixes    {prefix.num_distinct_blocks:,} of {prefix.num_blocks:,} blocks of "
            f"{prefix.block_tokens} tokens are distinct; an endless cache would hit "
            f"{prefix.ideal_hit_share:.1%} of prompt tokens"
        )
    return "\n".join(lines)


def _histogram_lines(values: Ints) -> str:
    bins = histogram(values)
    most = max(count for _, _, count in bins)
    lines = []
    for low, high, count in bins:
        bar = "█" * round(BAR_WIDTH * count / most) if most else ""
        lines.append(f"{low:>9,.0f} - {high:<9,.0f} {count:>8,} {bar}")
    return "\n".join(lines)
