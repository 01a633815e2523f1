"""Predicted against measured TTFT and TPOT of served runs, by model, precision and mode.

    python -m bench.latency_fidelity.run [--csv rows.csv] [--rows out.csv] [--json out.json]

The rows are third-party measurements (NVIDIA aiconfigurator, Apache-2.0); any file with the same
columns can be judged. Error = |predicted / measured - 1|; targets are medians over dense models.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench.latency_fidelity.predict import predict, predict_by_planner
from bench.latency_fidelity.report import (
    Outcome,
    by_family,
    by_mode,
    by_model,
    row_of,
    show,
    show_targets,
    show_worst,
    table,
    write_rows,
)
from bench.latency_fidelity.rows import DATA, Run, read_runs
from pdserve.domain.errors import LocalFault
from placement.framework import Framework

Predictor = Callable[[Run], tuple[float, float]]
GROUPS = {"model": by_model, "family": by_family}


def outcomes(
    runs: Sequence[Run], predictor: Predictor = predict
) -> tuple[list[Outcome], list[str]]:
    """Predictions, and for each run that none can be made for, why."""
    found, refused = [], []
    for run in runs:
        try:
            ttft_s, tpot_s = predictor(run)
        except LocalFault as error:
            refused.append(f"{run.id}: {error}")
        else:
            found.append(Outcome(run=run, ttft_s=ttft_s, tpot_s=tpot_s))
    return found, refused


def _predictor(arguments: argparse.Namespace) -> Predictor:
    if arguments.planner:
        return predict_by_planner
    return partial(predict, framework=Framework(name="none")) if arguments.plain else predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=DATA, help="rows to judge")
    parser.add_argument("--rows", type=Path, help="write every row's prediction here, as CSV")
    parser.add_argument("--json", type=Path, help="write medians, rows and refusals here")
    parser.add_argument("--by", choices=list(GROUPS), default="model")
    parser.add_argument(
        "--planner",
        action="store_true",
        help="aggregated rows too by the planner's simulator, batched as by our own workers",
    )
    parser.add_argument("--plain", action="store_true", help="no framework's corrections")
    parser.add_argument("--worst", type=int, default=12)
    parser.add_argument("--dense", action="store_true", help="dense models only")
    arguments = parser.parse_args()
    try:
        runs, unread = read_runs(arguments.csv)
    except LocalFault as error:
        sys.exit(f"error: {error}")
    if arguments.dense:
        runs = [run for run in runs if run.is_dense]
    found, refused = outcomes(runs, _predictor(arguments))
    refused = unread + refused
    groups, modes = table(found, GROUPS[arguments.by]), table(found, by_mode)
    show(groups)
    print()
    show(modes)
    show_targets(modes)
    show_worst(found, arguments.worst)
    print(f"\njudged {len(found)} rows, not judged {len(refused)}")
    for reason in refused:
        print(f"  {reason}")
    if arguments.rows:
        write_rows(found, arguments.rows)
    if arguments.json:
        summary = {
            "medians": [asdict(item) for item in (*groups, *modes)],
            "rows": [row_of(outcome) for outcome in found],
            "not_judged": refused,
        }
        arguments.json.write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
