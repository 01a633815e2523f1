"""The numbers behind a report's figures, simulated from a plan; plain values, fit for JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pdserve.domain.errors import LocalFault
from placement.demand import Workload
from placement.simulate import simulate
from placement.simulation.summary import attainment_interval, clean, judge_load
from placement.simulation.values import SimulationConfig, SimulationResult, TrafficClass

HOUR_S = 3600.0
BUCKET_S = 60.0
RATE_SHARES = (0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)
"""Of the planned rate: where attainment is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCurve:
    """One SLO class over the rates of its `AttainmentCurve`; `low` to `high` holds 95 %."""

    name: str
    target: float
    attainment: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttainmentCurve:
    """Share of requests that meet both objectives against requests/s, on the same requests."""

    planned_rate: float
    rates: tuple[float, ...]
    classes: tuple[ClassCurve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPoint:
    """The cheapest plan at a rate; `usd_per_hour` None where there is none."""

    rate: float
    usd_per_hour: float | None
    usd_per_million_tokens: float | None = None  # of prompts and answers together
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOff:
    """One design at the planned rate; p90 in seconds, None where it is overloaded.

    An overloaded design's percentiles would depend on the length of the run.
    """

    label: str
    ttft_p90_s: float | None
    tpot_p90_s: float | None
    usd_per_hour: float
    num_gpus: int
    is_chosen: bool = False
    is_on_front: bool = False
    is_overloaded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A replayed hour by the minute of arrival; None where nothing arrived or all was refused."""

    bucket_s: float
    start_s: tuple[float, ...]
    rate: tuple[float, ...]
    ttft_p90_s: tuple[float | None, ...]
    tpot_p90_s: tuple[float | None, ...]
    attainment: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A design that a trade-off is looked at for."""

    label: str
    config: SimulationConfig
    usd_per_hour: float
    is_chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """All that a report draws; what is None or empty is left out of the page."""

    slo: tuple[TrafficClass, ...] = ()
    attainment: AttainmentCurve | None = None
    cost: tuple[CostPoint, ...] = ()
    trade_offs: tuple[TradeOff, ...] = ()
    timeline: Timeline | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is infinite or undefined becomes None."""
        slo = [each.model_dump(mode="json") for each in self.slo]
        cleaned = clean(asdict(self) | {"slo": slo})
        assert isinstance(cleaned, dict)
        return cleaned


def attainment_curve(
    config: SimulationConfig,
    workload: Workload,
    planned_rate: float,
    shares: Sequence[float] = RATE_SHARES,
) -> AttainmentCurve:
    """Simulate the same requests at rates around the planned one."""
    rates = tuple(planned_rate * share for share in shares)
    met = [_met(config, simulate(replace(config, rate=rate), workload)) for rate in rates]
    classes = []
    for index, slo in enumerate(config.slo):
        values = [each[index] for each in met]
        intervals = [attainment_interval(value) for value in values]
        classes.append(
            ClassCurve(
                name=slo.name,
                target=slo.attainment,
                attainment=tuple(float(np.mean(v)) if len(v) else math.nan for v in values),
                low=tuple(low for low, _ in intervals),
                high=tuple(high for _, high in intervals),
            )
        )
    return AttainmentCurve(planned_rate=planned_rate, rates=rates, classes=tuple(classes))


def cheapest_at(rate: float, candidates: Sequence[Candidate], workload: Workload) -> CostPoint:
    """One point of a cost curve; its cost is None where no candidate keeps the promises."""
    ordered = sorted(candidates, key=lambda each: each.usd_per_hour)
    cheapest = next((each for each in ordered if _keeps(each, workload, rate)), None)
    if cheapest is None:
        return CostPoint(rate=rate, usd_per_hour=None, label="none")
    num_tokens = rate * float(np.mean(workload.prompt_tokens + workload.output_tokens))
    return CostPoint(
        rate=rate,
        usd_per_hour=cheapest.usd_per_hour,
        usd_per_million_tokens=1e6 * cheapest.usd_per_hour / (HOUR_S * num_tokens),
        label=cheapest.label,
    )


def trade_offs(
    candidates: Sequence[Candidate], workload: Workload, rate: float
) -> tuple[TradeOff, ...]:
    """TTFT against TPOT of each candidate that can hold every request.

    The front holds those that no other beats in both.
    """
    points = []
    for each in candidates:
        result = _simulated(each.config, workload, rate)
        if result is None:
            continue
        is_overloaded = judge_load(result).is_overloaded
        points.append(
            TradeOff(
                label=each.label,
                ttft_p90_s=None if is_overloaded else _p90(result.ttft_s),
                tpot_p90_s=None if is_overloaded else _p90(result.tpot_s),
                usd_per_hour=each.usd_per_hour,
                num_gpus=each.config.num_gpus,
                is_chosen=each.is_chosen,
                is_overloaded=is_overloaded,
            )
        )
    return tuple(replace(point, is_on_front=_is_on_front(point, points)) for point in points)


def replay_hour(config: SimulationConfig, workload: Workload, rate: float | None) -> Timeline:
    """Replay up to an hour: the recorded one, or at `rate` requests/s as far as requests reach."""
    result = simulate(replace(config, rate=rate), workload)
    starts_s = result.arrival_s - (result.arrival_s.min() if len(result.arrival_s) else 0.0)
    last_s = min(HOUR_S, float(starts_s.max()) if len(starts_s) else 0.0)
    num = max(1, math.floor(last_s / BUCKET_S))
    met = np.zeros(len(starts_s), bool)
    for index, slo in enumerate(config.slo):
        members = result.class_index == index
        met[members] = _meets(result, slo)[members]
    rows = []
    for bucket in range(num):
        inside = (starts_s >= bucket * BUCKET_S) & (starts_s < (bucket + 1) * BUCKET_S)
        count = int(inside.sum())
        rows.append(
            (
                bucket * BUCKET_S,
                count / BUCKET_S,
                _p90(result.ttft_s[inside]),
                _p90(result.tpot_s[inside]),
                float(met[inside].mean()) if count else None,
            )
        )
    start_s, per_s, ttft_s, tpot_s, attainment = zip(*rows, strict=True)
    return Timeline(
        bucket_s=BUCKET_S,
        start_s=start_s,
        rate=per_s,
        ttft_p90_s=ttft_s,
        tpot_p90_s=tpot_s,
        attainment=attainment,
    )


def _simulated(
    config: SimulationConfig, workload: Workload, rate: float
) -> SimulationResult | None:
    """None where the design could not hold some request."""
    try:
        return simulate(replace(config, rate=rate), workload)
    except LocalFault:
        return None


def _keeps(candidate: Candidate, workload: Workload, rate: float) -> bool:
    config = candidate.config
    result = _simulated(config, workload, rate)
    if result is None:
        return False
    met = _met(config, result)
    return all(
        len(share) == 0 or float(np.mean(share)) >= slo.attainment
        for slo, share in zip(config.slo, met, strict=True)
    )


def _met(config: SimulationConfig, result: SimulationResult) -> list[Any]:
    return [
        _meets(result, slo)[result.class_index == index] for index, slo in enumerate(config.slo)
    ]


def _meets(result: SimulationResult, slo: TrafficClass) -> Any:
    return (result.ttft_s <= slo.ttft_s) & (result.tpot_s <= slo.tpot_s)


def _p90(values: Any) -> float | None:
    """None of nothing, and where the ninth of ten requests was refused."""
    if len(values) == 0:
        return None
    if np.isfinite(values).all():
        return float(np.percentile(values, 90))
    found = float(np.percentile(values, 90, method="higher"))
    return found if math.isfinite(found) else None


def _is_on_front(point: TradeOff, others: Sequence[TradeOff]) -> bool:
    if point.ttft_p90_s is None or point.tpot_p90_s is None:
        return False
    return not any(
        other.ttft_p90_s is not None
        and other.tpot_p90_s is not None
        and other.ttft_p90_s <= point.ttft_p90_s
        and other.tpot_p90_s <= point.tpot_p90_s
        and (other.ttft_p90_s, other.tpot_p90_s) != (point.ttft_p90_s, point.tpot_p90_s)
        for other in others
    )
