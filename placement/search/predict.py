"""A design at one rate over all seeds: what to expect, how sure, and what gives way first."""

from typing import Any

import numpy as np

from placement.search.designs import Design
from placement.search.evaluate import Evaluator, interval_of_mean
from placement.search.results import ClassPrediction, Economy, Prediction
from placement.simulation.summary import Verdict, attainment_interval, judge_load
from placement.simulation.trace import Ints, Times, Trace
from placement.simulation.values import SimulationResult, TrafficClass

PERCENTILES = (50, 90, 99)
Run = tuple[Times, Trace, Ints]


def predict(
    evaluator: Evaluator,
    design: Design,
    rate: float,
    *,
    num_seeds: int | None = None,
    horizon_s: float | None = None,
) -> Prediction:
    """Simulate `design` at `rate` and reduce the runs."""
    seeds = range(num_seeds or evaluator.num_seeds)
    horizon_s = horizon_s or evaluator.horizon_s
    runs = [run for s in seeds if (run := evaluator.run(design, rate, s, horizon_s)) is not None]
    if not runs:
        return _impossible(rate, horizon_s)
    margins = [evaluator.judge(*run) for run in runs]
    attainments = [margin.attainment for margin in margins]
    verdict = _verdict(runs)
    is_overloaded = verdict == Verdict.OVERLOADED
    utilisation = _utilisation(design, runs)
    bottleneck = max(utilisation, key=lambda name: utilisation[name])
    mean_ttft = float(np.mean([margin.ttft for margin in margins]))
    mean_tpot = float(np.mean([margin.tpot for margin in margins]))
    binds = "TTFT" if mean_ttft <= mean_tpot else "TPOT"
    margin = float(np.mean([item.all for item in margins]))
    met = [] if len(runs) > 1 else met_promises(evaluator.slo, runs[0][0], runs[0][2])
    return Prediction(
        rate=rate,
        goodput=float(np.mean(attainments)) * rate,
        attainment=float(np.mean(attainments)),
        interval=_interval(attainments, met),
        classes=tuple(
            _class_prediction(
                item,
                runs,
                index if len(evaluator.slo) > 1 else None,
                has_percentiles=not is_overloaded,
            )
            for index, item in enumerate(evaluator.slo)
        ),
        percentiles=None if is_overloaded else _percentiles(runs, None),
        utilisation=utilisation,
        verdict=str(verdict),
        is_kept=margin >= 0,
        margin=margin,
        bottleneck=bottleneck,
        binds=margins[0].binding if margins[0].slowdowns else binds,
        horizon_s=horizon_s,
        num_seeds=len(runs),
        num_requests=sum(len(trace) for _, trace, _ in runs),
        slowdowns=margins[0].slowdowns,
        most_waiting=max(_most_waiting(times) for times, _, _ in runs),
        longest_wait_s=max(times.longest_wait_s for times, _, _ in runs),
        gap_cv=evaluator.traffic.gap_cv,
    )


def economy(design: Design, prediction: Prediction, mean_tokens: float) -> Economy:
    """Costs of a design at the predicted rate; `mean_tokens` are prompt and answer of a request."""
    tokens_per_s = prediction.rate * mean_tokens
    million = 3600 * tokens_per_s / 1e6
    return Economy(
        num_gpus=design.num_gpus,
        usd_per_hour=design.usd_per_hour,
        watts=design.watts,
        goodput_per_gpu=prediction.goodput / max(design.num_gpus, 1),
        usd_per_million_tokens=design.usd_per_hour / million if million else 0.0,
        joules_per_token=design.watts / tokens_per_s if tokens_per_s else 0.0,
    )


def _most_waiting(times: Times) -> int:
    """Requests without a first token, at the arrival that has the most of them."""
    is_served = np.isfinite(times.ttft_s)
    arrival_s = np.sort(times.arrival_s[is_served])
    first_s = np.sort((times.arrival_s + times.ttft_s)[is_served])
    num_arrived = np.arange(1, len(arrival_s) + 1)
    num_begun = np.searchsorted(first_s, arrival_s, side="left")
    return int(np.max(num_arrived - num_begun, initial=0))


def _verdict(runs: list[Run]) -> Verdict:
    """Overloaded where most seeds are."""
    found = [judge_load(SimulationResult.of(times, classes)).verdict for times, _, classes in runs]
    return max(sorted(set(found)), key=found.count)


def _utilisation(design: Design, runs: list[Run]) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for times, trace, _ in runs:
        span_s = max(float(np.ptp(trace.arrival_s)), 1e-9)
        first = 0
        for worker, count in design.counts:
            busy_s = times.busy_s[first : first + count]
            first += count
            shares.setdefault(worker.label, []).append(min(float(busy_s.mean()) / span_s, 1.0))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def _class_prediction(
    item: TrafficClass, runs: list[Run], index: int | None, *, has_percentiles: bool
) -> ClassPrediction:
    """Of the requests of class `index`; None: of all."""
    joint, ttfts, tpots = [], [], []
    met = np.zeros(0, bool)
    for times, _, classes in runs:
        members = _members(classes, index)
        if not members.any():
            continue
        ttft_met = times.ttft_s[members] <= item.ttft_s
        tpot_met = times.tpot_s[members] <= item.tpot_s
        met = ttft_met & tpot_met
        joint.append(float(met.mean()))
        ttfts.append(float(ttft_met.mean()))
        tpots.append(float(tpot_met.mean()))
    found = joint or [0.0]
    return ClassPrediction(
        name=item.name,
        ttft_s=item.ttft_s,
        tpot_s=item.tpot_s,
        target=item.attainment,
        attainment=float(np.mean(found)),
        interval=_interval(found, met),
        attainment_ttft=float(np.mean(ttfts or [0.0])),
        attainment_tpot=float(np.mean(tpots or [0.0])),
        percentiles=_percentiles(runs, index) if joint and has_percentiles else None,
    )


def _members(classes: Ints, index: int | None) -> Any:
    return np.ones(len(classes), bool) if index is None else classes == index


def _percentiles(runs: list[Run], index: int | None) -> dict[str, dict[str, float]]:
    """Over the requests of all runs, of class `index` where one is given."""
    found = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        parts = [getattr(times, name)[_members(classes, index)] for times, _, classes in runs]
        values = np.concatenate(parts)
        found[name] = {
            f"p{p}": float(np.percentile(values, p, method="higher")) for p in PERCENTILES
        }
    return found


def met_promises(slo: tuple[TrafficClass, ...], times: Times, classes: Ints) -> Any:
    """Which requests of a run met the promises of their class, in order of arrival."""
    if not slo:
        return []
    ttft_s = np.array([item.ttft_s for item in slo])
    tpot_s = np.array([item.tpot_s for item in slo])
    return (times.ttft_s <= ttft_s[classes]) & (times.tpot_s <= tpot_s[classes])


def _interval(by_seed: list[float], met: Any) -> tuple[float, float]:
    """Over seeds; of a single one, from the requests within it."""
    if len(by_seed) > 1:
        return _share(interval_of_mean(by_seed))
    if len(met) == 0:
        return (by_seed[0], by_seed[0])
    return attainment_interval(met)


def _share(interval: tuple[float, float]) -> tuple[float, float]:
    return (max(interval[0], 0.0), min(interval[1], 1.0))


def _impossible(rate: float, horizon_s: float) -> Prediction:
    return Prediction(
        rate=rate,
        goodput=0.0,
        attainment=0.0,
        interval=(0.0, 0.0),
        classes=(),
        percentiles=None,
        utilisation={},
        verdict="cannot serve",
        is_kept=False,
        margin=-1.0,
        bottleneck="",
        binds="",
        horizon_s=horizon_s,
        num_seeds=0,
        num_requests=0,
    )
