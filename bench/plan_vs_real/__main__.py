"""Profile a cluster, predict, then measure the same requests: `python -m bench.plan_vs_real`.

Every run stands between two profiles and its prediction is the mean of what both say, so that
prediction and measurement meet the same machine: cores that are shared change their speed within
minutes. The table compares medians over repetitions. One prefill and one decode worker keep to
cores of their own, as a plan's do; router and client go wherever there is room, and their share of
a core is stated. A run that other programs disturbed, or between whose profiles the machine changed
its speed by more than the limit, is printed and does not count.

With `--engine timed` steps sleep instead of computing: what is left to get wrong are the rules of
router and workers, the profile and the host's own times, and a busy machine disturbs these less.
"""

import argparse
import asyncio
import os
import secrets
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.plan_vs_real.figures import (
    Figures,
    capacity,
    measured,
    objectives,
    predict,
    step_times,
)
from bench.plan_vs_real.runs import LIMIT, SHARES, Row, Run, judged, read_runs, rows_of, write_runs
from bench.plan_vs_real.workload import draw_requests
from deploy.local import LocalCluster
from deploy.machine_load import LoadMeter, cpu_s
from deploy.profiling import profile_cluster, profiled_deployment, profiled_settings
from pdserve.client.inference import InferenceClient
from pdserve.client.load import only_model, run_load
from pdserve.client.values import Model
from pdserve.client.workload import TraceRequest
from pdserve.config.processes import CoefficientSettings
from placement.fitted_profile import FittedProfile
from placement.fitting import error_summary
from placement.probing import ProbePlan
from placement.simulation.values import TrafficClass

MIN_RUN_S = 12.0
TIMED = CoefficientSettings(
    fixed_s=0.01,
    prefill_token_s=1.5e-4,
    prefill_attention_s=1e-7,
    decode_token_s=5e-4,
    decode_context_token_s=2e-6,
)
LABELS = {
    "ttft_p50_s": "TTFT p50",
    "ttft_p90_s": "TTFT p90",
    "tpot_p50_s": "TPOT p50",
    "tpot_p90_s": "TPOT p90",
    "attainment": "attainment",
}


def main() -> None:
    """Run the bench; exits 1 only where it judged and found an error above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=("torch", "timed"), default="torch")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--requests", type=int, default=300, help="of each load run")
    parser.add_argument("--rounds", type=int, default=3, help="of each profile")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument(
        "--also", type=Path, action="append", default=[], help="judge with the runs of this --json"
    )
    arguments = parser.parse_args()
    console = Console()
    runs = [run for path in arguments.also for run in read_runs(path)]
    asyncio.run(run_bench(arguments, console, runs))
    rows = rows_of(runs)
    console.print(render(rows))
    sys.exit(judge(runs, rows, console))


async def run_bench(arguments: argparse.Namespace, console: Console, runs: list[Run]) -> None:
    """Profiles and runs by turns on one cluster; each run is added to `runs`."""
    num_runs = arguments.repetitions * len(SHARES)
    console.print(
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; {num_runs} runs between "
        f"{num_runs + 1} profiles"
    )
    settings = profiled_settings({"model": "demo"}, [])
    if arguments.engine == "timed":
        settings = settings.model_copy(update={"engine": "timed", "coefficients": TIMED})
    async with LocalCluster.start(profiled_deployment(settings)) as cluster:
        async with InferenceClient(cluster.public_address) as client:
            model = await only_model(client)
        plan = ProbePlan(num_rounds=arguments.rounds, max_batch=16)
        before = await _profile(cluster, plan, console)
        slo = objectives(before)  # one promise and one set of rates for all repetitions
        most = capacity(before, slo)
        console.print(
            f"capacity {most:.1f} requests/s at TTFT {slo.ttft_s * 1e3:.0f} ms, "
            f"TPOT {slo.tpot_s * 1e3:.1f} ms"
        )
        for repetition in range(arguments.repetitions):
            for share in SHARES:
                rate = share * most
                num = max(arguments.requests, int(rate * MIN_RUN_S))
                requests = draw_requests(num, rate, seed=repetition)
                load = await _load(cluster, model, slo, requests)
                after = await _profile(cluster, plan, console)
                runs.append(_compared(share, rate, slo, requests, load, (before, after)))
                _say_run(console, runs[-1])
                before = after
                if arguments.json is not None:  # a call that is cut short leaves what it has
                    write_runs(runs, arguments.json)


async def _profile(cluster: LocalCluster, plan: ProbePlan, console: Console) -> FittedProfile:
    meter = _meter(cluster)
    found = await profile_cluster(cluster.internal_address, plan, lambda text: None)
    found = replace(found, foreign_cores=meter.foreign_cores())
    p50, p90 = error_summary([each.error for each in found.residuals])
    console.print(
        f"profiled: residuals p50 {p50:.1%} p90 {p90:.1%}, other programs "
        f"{_cores(found.foreign_cores)}; {_served(found)}",
        style="dim",
    )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What a load run was found to be."""

    measured: Figures
    failures: Mapping[str, int]
    foreign_cores: float | None
    own_cores: Mapping[str, float]


async def _load(
    cluster: LocalCluster, model: Model, slo: TrafficClass, requests: tuple[TraceRequest, ...]
) -> _Load:
    meter, before = _meter(cluster), cpu_s(_pids(cluster))
    # Prompts of its own: none of them may be found in a prefix cache.
    seed = secrets.randbits(32)
    records, duration_s = await run_load(cluster.public_address, model, requests, seed=seed)
    after = cpu_s(_pids(cluster))
    return _Load(
        measured=measured(records, slo),
        failures=Counter(record.failure for record in records if not record.is_ok),
        foreign_cores=meter.foreign_cores(),
        own_cores={name: (after[name] - before[name]) / duration_s for name in after},
    )


def _compared(
    share: float,
    rate: float,
    slo: TrafficClass,
    requests: tuple[TraceRequest, ...],
    load: _Load,
    profiles: tuple[FittedProfile, FittedProfile],
) -> Run:
    """The prediction knows of the run only which requests came when."""
    predicted = Figures.median_of([predict(profile, slo, requests) for profile in profiles])
    foreign = [load.foreign_cores, *(profile.foreign_cores for profile in profiles)]
    earlier, later = (step_times(profile) for profile in profiles)
    return Run(
        share=share,
        rate=rate,
        num_requests=len(requests),
        predicted=predicted,
        measured=load.measured,
        failures=load.failures,
        drift={phase: later[phase] / earlier[phase] for phase in earlier},
        foreign_cores=max((each for each in foreign if each is not None), default=None),
        own_cores=load.own_cores,
    )


def render(rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE, title="plan against real", title_justify="left")
    table.add_column("load", justify="right")
    table.add_column("")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        mark = "" if abs(row.error) <= LIMIT else " *"
        cells = [_shown(row.name, value) for value in (row.predicted, row.measured)]
        table.add_row(f"{row.share:.0%}", LABELS[row.name], *cells, f"{row.error:+.1%}{mark}")
    return table


def judge(runs: list[Run], rows: list[Row], console: Console) -> int:
    """Say what it comes to; 1 for errors above the limit where every load could be judged."""
    bad = [row for row in rows if abs(row.error) > LIMIT]
    p50, p90 = error_summary([row.error for row in rows])
    console.print(
        f"{len(rows) - len(bad)} of {len(rows)} figures within {LIMIT:.0%}; "
        f"absolute error p50 {p50:.1%}, p90 {p90:.1%}; "
        f"{sum(sum(run.failures.values()) for run in runs)} requests failed"
    )
    num_disturbed = sum(run.disturbance is not None for run in runs)
    is_judged = all(run.disturbance is None for run in judged(runs))
    if num_disturbed:
        counting = "which do not count" if is_judged else "some load has no other: not judged"
        console.print(f"{num_disturbed} of {len(runs)} runs were disturbed, {counting}")
    return int(is_judged and bool(bad))


def _pids(cluster: LocalCluster) -> dict[str, int]:
    return {"client": os.getpid(), **{each.name: each.pid for each in cluster.processes}}


def _meter(cluster: LocalCluster) -> LoadMeter:
    return LoadMeter(process.pid for process in cluster.processes)


def _say_run(console: Console, run: Run) -> None:
    shares = ", ".join(f"{name} {share:.2f}" for name, share in run.own_cores.items())
    pairs = ", ".join(
        f"{LABELS[field.name]} {_shown(field.name, getattr(run.predicted, field.name))} / "
        f"{_shown(field.name, getattr(run.measured, field.name))}"
        for field in fields(Figures)
    )
    console.print(
        f"  {run.share:.0%}: {run.rate:.1f}/s, {run.num_requests} requests; cores: {shares}, "
        f"others {_cores(run.foreign_cores)}; predicted / measured: {pairs}"
    )
    if run.disturbance is not None:
        console.print(f"  does not count: {run.disturbance}")
    for reason, count in run.failures.items():
        console.print(f"  {count} requests failed: {reason}")


def _served(profile: FittedProfile) -> str:
    found, handoff = profile.serving, profile.handoff
    return (
        f"among others reading x{found.prefill:.2f}, beside decoding x{found.beside_prefill:.2f}; "
        f"decoding x{found.decode:.2f}, beside reading x{found.beside_decode:.2f}, "
        f"+{_ms(found.wake_s)} after a pause, "
        f"+{_ms(found.stolen_s)} for a new request; handoff {_ms(handoff.handoff_s)}, beside "
        f"decoding +{_ms(found.busy_handoff_s)}, KV {_ms(handoff.link_latency_s)}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _cores(cores: float | None) -> str:
    return "unknown" if cores is None else f"{cores:.2f}"


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "attainment" else _ms(value)


if __name__ == "__main__":
    main()
