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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.latency_fidelity.predict import fits, predict
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

LEAVE_OUT_ROWS = 60  # fitted at most when a model or backend is left out

Parameters = dict[str, float]
Family = tuple[str, ...]


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
        if not run.is_disaggregated and fits(run):
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


def pooled_starts(
    grouped: Mapping[Family, Sequence[Run]], key: Callable[[Run], str]
) -> list[tuple[str, list[Run], list[Run]]]:
    """(left out, rows to fit, rows to predict): what a reader without the left-out rows would use.

    The nearest rows that remain: of the family, else of its backend, else all dense ones.
    """
    splits = []
    everything = [run for runs in grouped.values() for run in runs]
    for family, runs in grouped.items():
        for name in sorted({key(run) for run in runs}):
            others = [run for run in everything if key(run) != name]
            near = [run for run in others if run.family == family]
            same_backend = [run for run in others if run.family[0] == family[0]]
            outside = [run for run in runs if key(run) == name]
            splits.append((name, near or same_backend or others, outside))
    return splits


def leave_out(
    grouped: Mapping[Family, Sequence[Run]], key: Callable[[Run], str], *, num_trials: int
) -> np.ndarray:
    """measured / predicted of every row, each by a fit that saw none of its model or backend."""
    found: dict[tuple[str, ...], Parameters] = {}
    ratios = []
    for name, inside, outside in pooled_starts(grouped, key):
        sample = inside[:: max(1, len(inside) // LEAVE_OUT_ROWS)]
        seen = tuple(run.id for run in sample)
        if seen not in found:
            found[seen] = fit(sample, num_trials=num_trials)
        part = errors(outside, found[seen])
        ratios.append(part)
        report(f"without {name}: {'-'.join(outside[0].family)}", part)
    return np.concatenate(ratios)


def report(label: str, ratios: np.ndarray) -> None:
    medians = np.nanmedian(np.abs(1 / ratios - 1), axis=0)
    print(
        f"{label:70} {len(ratios):4} rows  median |error|: "
        f"TTFT {medians[0]:6.1%}  TPOT {medians[1]:6.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument("--write", action="store_true", help="into frameworks.json")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--leave-out", choices=("model", "backend"))
    parser.add_argument("--dense", action="store_true", help="dense models only")
    parser.add_argument("--family", action="append", help="only these, such as vllm-fp8-h200_sxm")
    arguments = parser.parse_args()
    grouped = {
        family: runs
        for family, runs in families(read_runs()[0]).items()
        if (runs[0].is_dense or not arguments.dense)
        and (arguments.family is None or "-".join(family) in arguments.family)
    }
    if arguments.leave_out:
        dense = {family: runs for family, runs in grouped.items() if runs[0].is_dense}
        keys = {"model": lambda run: run.spec.name, "backend": lambda run: run.backend}
        key = keys[arguments.leave_out]
        report("all", leave_out(dense, key, num_trials=arguments.trials))
        return
    entries, everything = [], []
    for family, runs in grouped.items():
        if arguments.folds:
            ratios = cross_validate(runs, num_folds=arguments.folds, num_trials=arguments.trials)
        else:
            found = fit(runs, num_trials=arguments.trials)
            entries.append(entry(family, runs, found))
            ratios = errors(runs, found)
        report("-".join(family), ratios)
        everything.append(ratios)
    report(
        "all, each by a fit without its group" if arguments.folds else "all",
        np.concatenate(everything),
    )
    if arguments.write:
        write(entries)


def write(entries: Sequence[Mapping[str, object]]) -> None:
    """The families, kept or replaced, then one default for each backend: the dense ones' median."""
    listed = json.loads(TARGET.read_text(encoding="utf-8"))["frameworks"]
    known = {str(item["name"]): item for item in listed if "-" in str(item["name"])}
    known |= {str(item["name"]): item for item in entries}
    families = [known[name] for name in sorted(known)]
    defaults = []
    for backend in ("sglang", "trtllm", "vllm"):
        own = [
            item
            for item in families
            if str(item["name"]).startswith(backend) and "moe" not in str(item["name"])
        ]
        middle = {key: float(np.median([float(str(item[key])) for item in own])) for key in PRIOR}
        defaults.append({"name": backend, **middle, "relative_error": 0.12})
    vllm = next(item for item in defaults if item["name"] == "vllm")
    ours = {**vllm, "name": "pdserve", "relative_error": 0.2}
    about = (
        "Fitted by python -m bench.latency_fidelity.fit --write; a bare backend is the median of "
        "its dense families; pdserve is vllm's until pdserve profile has run on your engine."
    )
    lines = ",\n  ".join(json.dumps(item) for item in [ours, *defaults, *families])
    TARGET.write_text(
        f'{{"about": "{about}",\n "frameworks": [\n  {lines}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
