"""What `pdserve simulate` does: read, simulate, write, show."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pdserve.config.files import write_file
from pdserve.domain.errors import LocalFault
from placement.demand import Workload
from placement.simulate import simulate
from placement.simulation.settings import read_config
from placement.simulation.summary import PERCENTILES, Summary, summarise
from placement.simulation.values import SimulationConfig, SimulationResult
from placement.workload_files import read_workload

SHORT_S = 1.0
"""Nothing is said about work that takes less."""


def run_simulation(
    config_file: Path,
    workload_file: Path,
    *,
    requests_file: Path | None,
    json_file: Path | None,
    as_json: bool = False,
) -> None:
    """Simulate and report; raises `LocalFault` for whatever is wrong with the input."""
    config, workload = read_config(config_file), read_workload(workload_file)
    _check_classes(config, workload)
    console = Console(stderr=True)
    started_s = time.monotonic()
    with console.status("simulating (compiling first, if this is the first run)"):
        result = simulate(config, workload)
    took_s = time.monotonic() - started_s
    summary = summarise(config, result, workload.output_tokens)
    if requests_file is not None:
        write_file(requests_file, format_requests(result))
    text = json.dumps(to_json(config, summary), indent=2, allow_nan=False)
    if json_file is not None:
        write_file(json_file, text + "\n")
    if as_json:
        print(text)
        return
    show(config, summary, Console())
    if took_s > SHORT_S:
        console.print(f"simulated {len(workload):,} requests in {took_s:.1f} s")


def format_requests(result: SimulationResult) -> str:
    """One line for each request; infinite times are those of a refused one."""
    out = io.StringIO()
    out.write("request,arrival_s,ttft_s,tpot_s,e2e_s,prefill,decode\n")
    columns = (result.arrival_s, result.ttft_s, result.tpot_s, result.e2e_s)
    times = np.column_stack(columns).tolist()
    instances = zip(result.prefill.tolist(), result.decode.tolist(), strict=True)
    for request, (row, (prefill, decode)) in enumerate(zip(times, instances, strict=True)):
        out.write(f"{request},{','.join(map(repr, row))},{prefill},{decode}\n")
    return out.getvalue()


def to_json(config: SimulationConfig, summary: Summary) -> dict[str, Any]:
    """The summary and the configuration that it belongs to."""
    names = ("role", "replicas", "tp", "pp", "gpu")
    pools = [{name: getattr(pool, name) for name in names} for pool in config.pools]
    return {"rules": str(config.rules), "pools": pools, **summary.to_json()}


def show(config: SimulationConfig, summary: Summary, console: Console) -> None:
    """The table in the terminal; of an overloaded run it shows the verdict and no percentiles."""
    console.print(
        f"rules {config.rules}: {summary.num_requests:,} requests, {summary.rate:.3g}/s over "
        f"{summary.duration_s:,.1f} s, {summary.num_gpus} GPUs"
    )
    load = summary.load
    if load.is_overloaded:
        console.print(
            f"overloaded: requests pile up, {load.growth_before_first_token:.2f}/s before the "
            f"first token and {load.growth_in_decode:.2f}/s in decode; percentiles would depend on "
            "the length of the run"
        )
    else:
        console.print(_time_table(summary))
        console.print(f"load: {load.verdict}")
    if summary.num_refused:
        console.print(f"refused: {summary.num_refused:,} requests")
    if summary.prefix_hit_tokens:
        console.print(f"prefix cache: {summary.prefix_hit_tokens:,} prompt tokens were not read")
    console.print(_pool_table(config, summary))
    for item in summary.classes:
        low, high = item.interval
        console.print(
            f"SLO {item.name}: TTFT {item.ttft_s:g} s and TPOT {item.tpot_s:g} s: "
            f"{item.attainment:.1%} [{low:.1%}, {high:.1%}] of {item.num_requests:,} requests, "
            f"target {item.target:.0%}: {'met' if item.is_met else 'missed'} "
            f"(TTFT alone {item.attainment_ttft:.1%}, TPOT alone {item.attainment_tpot:.1%})"
        )
    if summary.classes:
        console.print(
            f"goodput: {summary.goodput:.3f} requests/s, {summary.goodput_per_gpu:.3f} per GPU"
        )


def _time_table(summary: Summary) -> Table:
    table = Table()
    table.add_column("seconds")
    for name in ("mean", *(f"p{p}" for p in PERCENTILES)):
        table.add_column(name, justify="right")
    for measure, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "end to end")):
        values = [summary.means[measure], *summary.percentiles[measure].values()]
        table.add_row(label, *(f"{value:.4f}" for value in values))
    return table


def _pool_table(config: SimulationConfig, summary: Summary) -> Table:
    table = Table()
    for name in ("pool", "instances", "tp", "pp", "gpu", "busy"):
        table.add_column(name, justify="left" if name in ("pool", "gpu") else "right")
    for pool, share in zip(config.pools, summary.utilisation, strict=True):
        cells = (pool.replicas, pool.tp, pool.pp, pool.gpu, f"{share:.0%}")
        table.add_row(str(pool.role), *map(str, cells))
    return table


def _check_classes(config: SimulationConfig, workload: Workload) -> None:
    classes = workload.class_index
    num = max(len(config.slo), 1)
    if classes is not None and int(classes.max()) >= num:
        row = int(classes.argmax())
        raise LocalFault(
            f"{workload.source}: request {row}: slo_class {int(classes.max())}, but the "
            f"configuration has {len(config.slo)} classes, numbered from 0"
        )
