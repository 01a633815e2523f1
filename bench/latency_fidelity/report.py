"""Medians by group, the targets, the worst cases and a file of all rows."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.latency_fidelity.rows import Run

TPOT_TARGET, TTFT_TARGET, TTFT_TARGET_DISAGGREGATED = 0.10, 0.25, 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run, predicted. An error is NaN where the row has no measurement."""

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
        if not self.run.is_disaggregated:
            return "aggregated"
        return "disaggregated" if self.run.is_complete else "disaggregated, workers not stated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Errors of one group."""

    group: str
    num_runs: int
    ttft_median: float
    ttft_p90: float
    tpot_median: float
    tpot_p90: float


def line(group: str, members: Sequence[Outcome]) -> Line:
    ttft = np.array([outcome.ttft_error for outcome in members])
    tpot = np.array([outcome.tpot_error for outcome in members])
    return Line(
        group=group,
        num_runs=len(members),
        ttft_median=_quantile(ttft, 0.5),
        ttft_p90=_quantile(ttft, 0.9),
        tpot_median=_quantile(tpot, 0.5),
        tpot_p90=_quantile(tpot, 0.9),
    )


def _quantile(errors: np.ndarray, share: float) -> float:
    known = errors[~np.isnan(errors)]
    return float(np.quantile(known, share)) if len(known) else math.nan


def table(found: Sequence[Outcome], key: Callable[[Outcome], str]) -> list[Line]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in found:
        groups[key(outcome)].append(outcome)
    return [line(group, members) for group, members in sorted(groups.items())]


def by_model(outcome: Outcome) -> str:
    run = outcome.run
    kind = "dense" if run.is_dense else "moe"
    return f"{kind:5} {run.model} {run.precision or 'bf16'} {outcome.mode}"


def by_family(outcome: Outcome) -> str:
    run = outcome.run
    return f"{'-'.join(run.family)} {outcome.mode}"


def by_mode(outcome: Outcome) -> str:
    return f"all {'dense' if outcome.run.is_dense else 'moe'} {outcome.mode}"


def show(lines: Sequence[Line]) -> None:
    width = max([len(item.group) for item in lines], default=0)
    print(
        f"{'':{width}} {'runs':>4}  {'TTFT median':>11} {'p90':>6}  {'TPOT median':>11} {'p90':>6}"
    )
    for item in lines:
        print(
            f"{item.group:{width}} {item.num_runs:4}  {item.ttft_median:11.1%} "
            f"{item.ttft_p90:6.0%}  {item.tpot_median:11.1%} {item.tpot_p90:6.0%}"
        )


def show_targets(modes: Sequence[Line]) -> None:
    """Dense models only, as the promise is worded."""
    for mode, ttft in (
        ("aggregated", TTFT_TARGET),
        ("disaggregated", TTFT_TARGET_DISAGGREGATED),
    ):
        for item in modes:
            if item.group == f"all dense {mode}":
                met = item.ttft_median <= ttft and item.tpot_median <= TPOT_TARGET
                print(
                    f"dense {mode}: target TTFT {ttft:.0%}, TPOT {TPOT_TARGET:.0%}: "
                    f"{'met' if met else 'missed'}"
                )


def show_worst(found: Sequence[Outcome], count: int) -> None:
    dense = [outcome for outcome in found if outcome.run.is_dense]
    for name in ("ttft", "tpot"):
        known = [item for item in dense if not math.isnan(getattr(item, f"{name}_error"))]
        known.sort(key=lambda item: -float(getattr(item, f"{name}_error")))
        print(f"\nworst {name.upper()}, dense models:")
        for item in known[:count]:
            measured, predicted = getattr(item.run, f"{name}_s"), getattr(item, f"{name}_s")
            print(
                f"  {item.run.group} c{item.run.clients}: measured {measured * 1e3:.1f} ms, "
                f"predicted {predicted * 1e3:.1f} ms"
            )


def row_of(outcome: Outcome) -> dict[str, str | int | float | None]:
    """One row of the outputs; None where nothing was measured."""
    run = outcome.run

    def known(value: float, digits: int = 3) -> float | None:
        return None if math.isnan(value) else round(value, digits)

    return {
        "id": run.id,
        "group": run.group,
        "mode": outcome.mode,
        "clients": run.clients,
        "ttft_ms": known(run.ttft_s * 1e3),
        "predicted_ttft_ms": known(outcome.ttft_s * 1e3),
        "ttft_error": known(outcome.ttft_error, 4),
        "tpot_ms": known(run.tpot_s * 1e3),
        "predicted_tpot_ms": known(outcome.tpot_s * 1e3),
        "tpot_error": known(outcome.tpot_error, 4),
    }


def write_rows(found: Sequence[Outcome], path: Path) -> None:
    rows = [row_of(outcome) for outcome in found]
    with path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
