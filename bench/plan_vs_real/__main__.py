"""Profile a cluster, predict, then measure the same requests: `python -m bench.plan_vs_real`.

Each repetition profiles anew, so that prediction and measurement meet the same machine; the table
compares medians over repetitions. One prefill and one decode worker keep to cores of their own, as
a plan's do; router and client go wherever there is room, and their share of a core is stated. A run
that other programs disturbed, or its profile, is printed and does not count.

With `--engine timed` steps sleep instead of computing: what is left to get wrong are the rules of
router and workers, the profile and the host's own times, and a busy machine disturbs these less.
"""

import argparse
import asyncio
import json
import math
import os
import secrets
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from bench.plan_vs_real.figures import Figures, capacity, measured, objectives, predict
from bench.plan_vs_real.workload import draw_requests
from deploy.local import LocalCluster
from deploy.machine_load import LoadMeter, cpu_s
from deploy.profiling import profile_cluster, profiled_deployment, profiled_settings
from pdserve.client.inference import InferenceClient
from pdserve.client.load import only_model, run_load
from pdserve.client.values import Model
from pdserve.config.processes import CoefficientSettings
from placement.fitted_profile import FittedProfile
from placement.fitting import error_summary
from placement.probing import ProbePlan
from placement.simulation.summary import clean
from placement.simulation.values import SloClass

SHARES = (0.3, 0.6, 0.9)
LIMIT = 0.15
MAX_FOREIGN_CORES = 0.3
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load run beside its prediction."""

    share: float
    rate: float
    num_requests: int
    predicted: Figures
    measured: Figures
    failures: Mapping[str, int]  # by reason
    foreign_cores: float | None  # busy with other programs, the more of profile and run
    own_cores: Mapping[str, float]

    @property
    def is_quiet(self) -> bool:
        return self.foreign_cores is None or self.foreign_cores <= MAX_FOREIGN_CORES


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure at one load, medians over repetitions."""

    share: float
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """predicted / measured - 1; infinite where nothing was answered."""
        is_known = math.isfinite(self.measured) and self.measured != 0
        return self.predicted / self.measured - 1 if is_known else math.inf


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
    """Repetitions of profile, prediction and measurement on one cluster, added to `runs`."""
    console.print(
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; "
        f"{arguments.repetitions} repetitions"
    )
    settings = profiled_settings("demo")
    if arguments.engine == "timed":
        settings = settings.model_copy(update={"engine": "timed", "coefficients": TIMED})
    async with LocalCluster.start(profiled_deployment(settings)) as cluster:
        async with InferenceClient(cluster.public_address) as client:
            model = await only_model(client)
        slo: SloClass | None = None
        for repetition in range(arguments.repetitions):
            plan = ProbePlan(num_rounds=arguments.rounds, max_batch=16)
            meter = _meter(cluster)
            profile = await profile_cluster(cluster.internal_address, plan, lambda text: None)
            profile = replace(profile, foreign_cores=meter.foreign_cores())
            slo = slo or objectives(profile)  # one promise for all repetitions
            most = capacity(profile, slo)
            _say_profile(console, repetition, profile, slo, most)
            for share in SHARES:
                run = await _measure(cluster, model, profile, slo, share, most, arguments.requests)
                runs.append(run)
                _say_run(console, run)
            if arguments.json is not None:  # a run that is cut short leaves what it has
                write_runs(runs, arguments.json)


async def _measure(
    cluster: LocalCluster,
    model: Model,
    profile: FittedProfile,
    slo: SloClass,
    share: float,
    most: float,
    num_requests: int,
) -> Run:
    rate = share * most
    # The prediction comes first and knows nothing of the run.
    requests = draw_requests(max(num_requests, int(rate * MIN_RUN_S)), rate, seed=1)
    predicted = predict(profile, slo, requests)
    meter, before = _meter(cluster), cpu_s(_pids(cluster))
    # Prompts of its own: none of them may be found in a prefix cache.
    seed = secrets.randbits(32)
    records, duration_s = await run_load(cluster.public_address, model, requests, seed=seed)
    after = cpu_s(_pids(cluster))
    foreign = [meter.foreign_cores(), profile.foreign_cores]
    return Run(
        share=share,
        rate=rate,
        num_requests=len(requests),
        predicted=predicted,
        measured=measured(records, slo),
        failures=Counter(record.failure for record in records if not record.is_ok),
        foreign_cores=max((each for each in foreign if each is not None), default=None),
        own_cores={name: (after[name] - before[name]) / duration_s for name in after},
    )


def read_runs(path: Path) -> list[Run]:
    """The runs of an earlier call."""
    kept = json.loads(path.read_text())["runs"]
    figures = [{name: Figures(**run[name]) for name in ("predicted", "measured")} for run in kept]
    return [Run(**{**run, **pair}) for run, pair in zip(kept, figures, strict=True)]


def write_runs(runs: list[Run], path: Path) -> None:
    """All that was measured, and what it comes to."""
    content = {
        "cores": os.cpu_count(),
        "foreign_cores": foreign_cores(runs),
        "rows": [{**asdict(row), "error": row.error} for row in rows_of(runs)],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(clean(content), indent=1, allow_nan=False) + "\n")


def foreign_cores(runs: list[Run]) -> float:
    """What other programs kept busy, the median; 0 where the system does not tell."""
    known = [run.foreign_cores for run in runs if run.foreign_cores is not None]
    return median(known) if known else 0.0


def rows_of(runs: list[Run]) -> list[Row]:
    """Medians over repetitions, by load and figure; of the quiet ones, where there are any."""
    rows = []
    for share in SHARES:
        chosen = [run for run in runs if run.share == share]
        chosen = [run for run in chosen if run.is_quiet] or chosen
        predicted = Figures.median_of([run.predicted for run in chosen])
        found = Figures.median_of([run.measured for run in chosen])
        for field in fields(Figures):
            rows.append(
                Row(
                    share=share,
                    name=field.name,
                    predicted=getattr(predicted, field.name),
                    measured=getattr(found, field.name),
                )
            )
    return rows


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
    """Say what it comes to; 1 for errors above the limit on a quiet machine."""
    bad = [row for row in rows if abs(row.error) > LIMIT]
    p50, p90 = error_summary([row.error for row in rows])
    console.print(
        f"{len(rows) - len(bad)} of {len(rows)} figures within {LIMIT:.0%}; "
        f"absolute error p50 {p50:.1%}, p90 {p90:.1%}; "
        f"{sum(sum(run.failures.values()) for run in runs)} requests failed"
    )
    num_quiet = sum(run.is_quiet for run in runs)
    is_judged = all(any(run.is_quiet for run in runs if run.share == share) for share in SHARES)
    if num_quiet < len(runs):
        console.print(
            f"{'' if is_judged else 'not judged: '}other programs kept more than "
            f"{MAX_FOREIGN_CORES} of {os.cpu_count()} cores busy in {len(runs) - num_quiet} of "
            f"{len(runs)} runs{', which do not count' if is_judged else ''}"
        )
    return int(is_judged and bool(bad))


def _pids(cluster: LocalCluster) -> dict[str, int]:
    return {"client": os.getpid(), **{each.name: each.pid for each in cluster.processes}}


def _meter(cluster: LocalCluster) -> LoadMeter:
    return LoadMeter(process.pid for process in cluster.processes)


def _say_profile(
    console: Console,
    repetition: int,
    profile: FittedProfile,
    slo: SloClass,
    most: float,
) -> None:
    p50, p90 = error_summary([each.error for each in profile.residuals])
    console.print(
        f"repetition {repetition + 1}: profiled, residuals p50 {p50:.1%} p90 {p90:.1%}, other "
        f"programs {_cores(profile.foreign_cores)}; {_served(profile)}; "
        f"capacity {most:.1f} requests/s at TTFT {slo.ttft_s * 1e3:.0f} ms, "
        f"TPOT {slo.tpot_s * 1e3:.1f} ms"
    )


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
    for reason, count in run.failures.items():
        console.print(f"  {count} requests failed: {reason}")


def _served(profile: FittedProfile) -> str:
    found, handoff = profile.serving, profile.handoff
    return (
        f"among others reading x{found.prefill:.2f}, beside decoding x{found.beside_prefill:.2f}; "
        f"decoding x{found.decode:.2f}, beside reading x{found.beside_decode:.2f}, "
        f"+{_ms(found.decode_answer_s)} an answer, +{_ms(found.wake_s)} after a pause, "
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
