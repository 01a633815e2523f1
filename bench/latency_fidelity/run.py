"""Predicted against measured TTFT and TPOT of served runs, by model, precision and mode.

    python -m bench.latency_fidelity.run [--csv rows.csv] [--json out.json] [--worst 12]

The rows are third-party measurements (NVIDIA aiconfigurator, Apache-2.0); any file with the same
columns can be judged. Error = |predicted / measured - 1|; targets are medians over dense models.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.latency_fidelity.predict import predict
from bench.latency_fidelity.rows import DATA, Run, read_runs
from pdserve.domain.errors import LocalFault

TPOT_TARGET, TTFT_TARGET, TTFT_TARGET_DISAGGREGATED = 0.10, 0.25, 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run, predicted."""

    run: Run
    ttft_s: float
    tpot_s: float

    @property
    def ttft_error(self) -> float:
        return abs(self.ttft_s / self.run.ttft_s - 1)

    @property
    def tpot_error(self) -> float:
        return abs(self.tpot_s / self.run.tpot_s - 1)

    @property
    def mode(self) -> str:
        return "disaggregated" if self.run.is_disaggregated else "aggregated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Medians of one group."""

    group: str
    num_runs: int
    ttft_median: float
    ttft_p90: float
    tpot_median: float
    tpot_p90: float


def outcomes(runs: Sequence[Run]) -> tuple[list[Outcome], list[str]]:
    """Predictions, and for each run that none can be made for, why."""
    found, refused = [], []
    for run in runs:
        try:
            ttft_s, tpot_s = predict(run)
        except LocalFault as error:
            refused.append(f"{run.id}: {error}")
        else:
            found.append(Outcome(run=run, ttft_s=ttft_s, tpot_s=tpot_s))
    return found, refused


def line(group: str, members: Sequence[Outcome]) -> Line:
    ttft = [outcome.ttft_error for outcome in members]
    tpot = [outcome.tpot_error for outcome in members]
    return Line(
        group=group,
        num_runs=len(members),
        ttft_median=float(np.median(ttft)),
        ttft_p90=float(np.quantile(ttft, 0.9)),
        tpot_median=float(np.median(tpot)),
        tpot_p90=float(np.quantile(tpot, 0.9)),
    )


def table(found: Sequence[Outcome], key: Callable[[Outcome], str]) -> list[Line]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in found:
        groups[key(outcome)].append(outcome)
    return [line(group, members) for group, members in sorted(groups.items())]


def by_model(outcome: Outcome) -> str:
    run = outcome.run
    kind = "dense" if run.is_dense else "moe"
    return f"{kind:5} {run.model} {run.precision or 'bf16'} {outcome.mode}"


def by_mode(outcome: Outcome) -> str:
    return f"all {'dense' if outcome.run.is_dense else 'moe'} {outcome.mode}"


def show(lines: Sequence[Line]) -> None:
    print(f"{'':58} {'runs':>4}  {'TTFT median':>11} {'p90':>6}  {'TPOT median':>11} {'p90':>6}")
    for item in lines:
        print(
            f"{item.group:58} {item.num_runs:4}  {item.ttft_median:11.1%} {item.ttft_p90:6.0%}  "
            f"{item.tpot_median:11.1%} {item.tpot_p90:6.0%}"
        )


def show_worst(found: Sequence[Outcome], count: int) -> None:
    dense = [outcome for outcome in found if outcome.run.is_dense]
    for name, error in (
        ("TTFT", lambda outcome: outcome.ttft_error),
        ("TPOT", lambda outcome: outcome.tpot_error),
    ):
        print(f"\nworst {name}, dense models:")
        for outcome in sorted(dense, key=error, reverse=True)[:count]:
            run = outcome.run
            measured, predicted = (
                (run.ttft_s, outcome.ttft_s) if name == "TTFT" else (run.tpot_s, outcome.tpot_s)
            )
            print(
                f"  {run.group} c{run.concurrency}: measured {measured * 1e3:.1f} ms, "
                f"predicted {predicted * 1e3:.1f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=DATA, help="rows to judge")
    parser.add_argument("--json", type=Path, help="write all medians and rows here")
    parser.add_argument("--worst", type=int, default=12)
    parser.add_argument("--dense", action="store_true", help="dense models only")
    arguments = parser.parse_args()
    found, refused = outcomes(read_runs(arguments.csv))
    found = [outcome for outcome in found if outcome.run.is_dense or not arguments.dense]
    models, modes = table(found, by_model), table(found, by_mode)
    show(models)
    print()
    show(modes)
    show_worst(found, arguments.worst)
    for reason in refused:
        print(f"not judged: {reason}")
    if arguments.json:
        rows = [
            {
                "id": outcome.run.id,
                "group": outcome.run.group,
                "concurrency": outcome.run.concurrency,
                "ttft_s": [outcome.run.ttft_s, outcome.ttft_s],
                "tpot_s": [outcome.run.tpot_s, outcome.tpot_s],
            }
            for outcome in found
        ]
        summary = [asdict(item) for item in (*models, *modes)]
        arguments.json.write_text(json.dumps({"medians": summary, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
