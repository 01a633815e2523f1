"""Fits each family's corrections to all its rows, and validates them on held-out groups.

    python -m bench.latency_fidelity.fit --write      # all rows, into frameworks.json
    python -m bench.latency_fidelity.fit --folds 5    # error on groups not fitted

A seeded random coordinate search on the mean clipped log error, held to priors: factors near 1 and
times near what a host takes. No row, lengths, TP or concurrency has a parameter of its own.
"""

import argparse
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.latency_fidelity.predict import predict
from bench.latency_fidelity.rows import Run, read_runs
from placement.framework import Framework

PRIOR = {
    "step_s": 5e-4,
    "request_s": 1e-5,
    "prefill_step_s": 1e-3,
    "layer_s": 1e-6,
    "prompt_s": 2e-3,
    "prompt_token_s": 1e-6,
    "token_s": 5e-5,
    "reply_s": 2e-3,
    "gemm_scale": 1.0,
    "prefill_scale": 1.05,
    "attention_scale": 1.0,
    "comm_scale": 1.0,
}
SCALE_WEIGHT, TIME_WEIGHT = 0.05, 0.0008  # of squared log distances from the prior
TTFT_WEIGHT = 0.4
TARGET = Path(__file__).parents[2] / "placement" / "data" / "frameworks.json"

Parameters = dict[str, float]


def errors(runs: Sequence[Run], parameters: Parameters) -> np.ndarray:
    """measured / predicted of (TTFT, TPOT) for each run."""
    framework = Framework(name="fit", **parameters)
    ratios = []
    for run in runs:
        ttft_s, tpot_s = predict(run, framework)
        ratios.append((run.ttft_s / ttft_s, run.tpot_s / tpot_s))
    return np.array(ratios)


def loss(runs: Sequence[Run], parameters: Parameters) -> float:
    logs = np.abs(np.log(errors(runs, parameters)))
    fit = np.clip(logs[:, 1], 0, 0.5).mean() + TTFT_WEIGHT * np.clip(logs[:, 0], 0, 1).mean()
    prior = sum(
        (SCALE_WEIGHT if name.endswith("scale") else TIME_WEIGHT)
        * float(np.log(value / PRIOR[name])) ** 2
        for name, value in parameters.items()
    )
    return float(fit + prior)


def fit(runs: Sequence[Run], *, num_trials: int, start: Parameters | None = None) -> Parameters:
    """The best of `num_trials` seeded moves of one or two parameters."""
    rng = np.random.default_rng(0)
    best = dict(start or PRIOR)
    best_loss = loss(runs, best)
    names = list(PRIOR)
    widths = {name: 0.1 if name.endswith("scale") else 0.7 for name in names}
    for _ in range(num_trials):
        moved = rng.choice(names, size=int(rng.integers(1, 3)), replace=False)
        trial = dict(best)
        for name in moved:
            trial[name] = best[name] * float(np.exp(rng.normal() * widths[name]))
        trial_loss = loss(runs, trial)
        is_better = trial_loss < best_loss
        if is_better:
            best, best_loss = trial, trial_loss
        for name in moved:
            least = 0.02 if name.endswith("scale") else 0.1
            widths[name] = max(widths[name] * (1.3 if is_better else 0.97), least)
    return best


def families(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    grouped: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if not run.is_disaggregated:
            grouped[run.family].append(run)
    return dict(sorted(grouped.items()))


def fold_of(run: Run, num_folds: int) -> int:
    return zlib.crc32(run.group.encode()) % num_folds


def cross_validate(runs: Sequence[Run], *, num_folds: int, num_trials: int) -> np.ndarray:
    """measured / predicted of each run, by a fit that saw no run of its group."""
    ratios = np.ones((len(runs), 2))
    for fold in range(num_folds):
        inside = [run for run in runs if fold_of(run, num_folds) != fold]
        outside = [index for index, run in enumerate(runs) if fold_of(run, num_folds) == fold]
        if not inside or not outside:
            continue
        found = fit(inside, num_trials=num_trials)
        ratios[outside] = errors([runs[index] for index in outside], found)
    return ratios


def entry(family: tuple[str, ...], runs: Sequence[Run], found: Parameters) -> dict[str, object]:
    spread = float(np.median(np.abs(1 / errors(runs, found)[:, 1] - 1)))
    values = {name: float(f"{value:.3g}") for name, value in found.items()}
    return {"name": "-".join(family), **values, "relative_error": round(spread, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument("--write", action="store_true", help="replace frameworks.json")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="dense models only")
    arguments = parser.parse_args()
    entries = []
    measured: list[tuple[Run, float, float]] = []
    for family, runs in families(read_runs()).items():
        if arguments.dense and not runs[0].is_dense:
            continue
        if arguments.folds:
            ratios = cross_validate(runs, num_folds=arguments.folds, num_trials=arguments.trials)
            measured += [(run, *ratio) for run, ratio in zip(runs, ratios, strict=True)]
        else:
            found = fit(runs, num_trials=arguments.trials)
            entries.append(entry(family, runs, found))
            ratios = errors(runs, found)
        medians = np.median(np.abs(1 / ratios - 1), axis=0)
        print(
            f"{'-'.join(family):36} {len(runs):4} rows  median |error|: "
            f"TTFT {medians[0]:6.1%}  TPOT {medians[1]:6.1%}",
            flush=True,
        )
    if measured:
        both = np.median([[abs(1 / t - 1), abs(1 / p - 1)] for _, t, p in measured], axis=0)
        print(
            f"all {len(measured)} rows, each by a fit without its group: "
            f"TTFT {both[0]:.1%}, TPOT {both[1]:.1%}"
        )
    if arguments.write:
        write(entries)


def write(entries: list[dict[str, object]]) -> None:
    """The families, then one default for each backend: the median of its dense families."""
    defaults = []
    for backend in ("sglang", "trtllm", "vllm"):
        own = [
            e for e in entries if str(e["name"]).startswith(backend) and "moe" not in str(e["name"])
        ]
        if own:
            middle = {k: float(np.median([float(str(e[k])) for e in own])) for k in PRIOR}
            defaults.append({"name": backend, **middle, "relative_error": 0.12})
    vllm = next(item for item in defaults if item["name"] == "vllm")
    ours = {**vllm, "name": "pdserve", "relative_error": 0.2}
    about = (
        "Fitted by python -m bench.latency_fidelity.fit --write; a bare backend is the median of "
        "its dense families; pdserve is vllm's until pdserve profile has run on your engine."
    )
    lines = ",\n  ".join(json.dumps(item) for item in [ours, *defaults, *entries])
    TARGET.write_text(
        f'{{"about": "{about}",\n "frameworks": [\n  {lines}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
