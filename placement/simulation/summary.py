"""From per-request times to the figures that a decision needs: attainment, goodput, overload."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from placement.simulation.trace import Floats
from placement.simulation.values import SimulationConfig, SimulationResult, TrafficClass

PERCENTILES = (50, 90, 99)
Z_95 = 1.96
NUM_BATCHES = 20
T_95_OF_BATCHES = 2.093  # Student's t, NUM_BATCHES - 1 degrees of freedom
MIN_REQUESTS_FOR_BATCHES = 10 * NUM_BATCHES
MIN_GROWTH_SHARE = 0.02  # of the arrivals that stay in the cluster: above it, overload
MIN_GROWTH_REQUESTS = 5.0
MIN_GROWTH_OF_NUMBER = 0.5  # of those that were there before: a steady number also varies
CLEAR_GROWTH_SHARE = 0.2  # before the first token: overload however short the run
MIN_LIFETIMES = 4.0  # a run must last so many mean request times to tell a trend


class Verdict(StrEnum):
    STABLE = "stable"
    OVERLOADED = "overloaded"
    TOO_SHORT = "too short to tell"
    CLOSED_LOOP = "closed loop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Whether the cluster keeps up; growth in requests/s, each at its place."""

    verdict: Verdict
    growth_before_first_token: float
    growth_in_decode: float

    @property
    def is_overloaded(self) -> bool:
        return self.verdict is Verdict.OVERLOADED


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSummary:
    """One SLO class; attainments are shares of its requests, the interval is of 95 %."""

    name: str
    num_requests: int
    ttft_s: float
    tpot_s: float
    target: float
    attainment_ttft: float
    attainment_tpot: float
    attainment: float
    interval: tuple[float, float]
    is_met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All requests of one simulation; `percentiles` by measure, then by percentile."""

    num_requests: int
    num_refused: int
    duration_s: float
    rate: float
    output_tokens_per_s: float
    percentiles: dict[str, dict[str, float]]
    means: dict[str, float]
    classes: tuple[ClassSummary, ...]
    goodput: float  # requests/s that met every SLO of their class
    goodput_per_gpu: float
    num_gpus: int
    utilisation: tuple[float, ...]  # of each pool
    load: Load
    prefix_hit_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is infinite or undefined becomes None."""
        plain = asdict(self)
        plain["load"]["verdict"] = str(self.load.verdict)
        cleaned = clean(plain)
        assert isinstance(cleaned, dict)
        return cleaned


def summarise(config: SimulationConfig, result: SimulationResult, outputs: Any) -> Summary:
    """Reduce a result; `outputs` are the workload's output tokens."""
    num = len(result.arrival_s)
    start_s = float(result.arrival_s.min()) if num else 0.0
    duration_s = max(result.end_s - start_s, 0.0)
    finished = np.isfinite(result.e2e_s)
    span_s = float(np.ptp(result.arrival_s)) if num else 0.0
    is_met = np.ones(num, bool) & finished
    classes = []
    for index, slo in enumerate(config.slo):
        members = result.class_index == index
        met = (result.ttft_s <= slo.ttft_s) & (result.tpot_s <= slo.tpot_s)
        is_met[members] &= met[members]
        classes.append(_summarise_class(slo, result, members, met))
    measures = {"ttft_s": result.ttft_s, "tpot_s": result.tpot_s, "e2e_s": result.e2e_s}
    # An open trace's rate is that of its arrivals: the drain at the end is not load.
    per_s = num / span_s if span_s > 0 and config.concurrency is None else 0.0
    if per_s == 0.0 and duration_s > 0:
        per_s = num / duration_s
    goodput = float(is_met.mean()) * per_s if num else 0.0
    return Summary(
        num_requests=num,
        num_refused=result.num_refused,
        duration_s=duration_s,
        rate=per_s,
        output_tokens_per_s=_ratio(float(np.asarray(outputs)[finished].sum()), duration_s),
        percentiles={name: _percentiles(values) for name, values in measures.items()},
        means={name: _mean(values[finished]) for name, values in measures.items()},
        classes=tuple(classes),
        goodput=goodput,
        goodput_per_gpu=_ratio(goodput, config.num_gpus),
        num_gpus=config.num_gpus,
        utilisation=_utilisation(config, result, duration_s),
        load=judge_load(result, is_closed=config.concurrency is not None),
        prefix_hit_tokens=result.prefix_hit_tokens,
    )


def attainment_interval(met: Any) -> tuple[float, float]:
    """95 % interval of a share of requests in order of arrival.

    Neighbours share queues, so the spread of NUM_BATCHES batch means counts where it is wider than
    Wilson's interval for independent requests.
    """
    num = len(met)
    if num == 0:
        return (0.0, 1.0)
    share = float(np.mean(met))
    scale = 1 + Z_95**2 / num
    centre = (share + Z_95**2 / (2 * num)) / scale
    half = Z_95 * math.sqrt(share * (1 - share) / num + Z_95**2 / (4 * num**2)) / scale
    low, high = centre - half, centre + half
    if num >= MIN_REQUESTS_FOR_BATCHES:
        batches = [float(np.mean(batch)) for batch in np.array_split(met, NUM_BATCHES)]
        spread = T_95_OF_BATCHES * float(np.std(batches, ddof=1)) / math.sqrt(NUM_BATCHES)
        low, high = min(low, share - spread), max(high, share + spread)
    return (max(low, 0.0), min(high, 1.0))


def judge_load(result: SimulationResult, *, is_closed: bool = False) -> Load:
    """Overloaded where requests pile up: the second quarter of the arrivals against the last."""
    if is_closed:
        return Load(
            verdict=Verdict.CLOSED_LOOP, growth_before_first_token=0.0, growth_in_decode=0.0
        )
    kept = np.isfinite(result.e2e_s)
    arrival_s = result.arrival_s[kept]
    span_s = float(np.ptp(arrival_s)) if len(arrival_s) else 0.0
    if span_s == 0.0:
        return Load(verdict=Verdict.TOO_SHORT, growth_before_first_token=0.0, growth_in_decode=0.0)
    arrival_s = arrival_s - arrival_s.min()
    first_s = arrival_s + result.ttft_s[kept]
    end_s = arrival_s + result.e2e_s[kept]
    growths, is_growing = [], False
    rate = len(arrival_s) / span_s
    for begin, end in ((arrival_s, first_s), (first_s, end_s)):
        early = _mean_number(begin, end, 0.25 * span_s, 0.5 * span_s)
        late = _mean_number(begin, end, 0.75 * span_s, span_s)
        growth = (late - early) / (0.5 * span_s)
        growths.append(growth)
        least = max(MIN_GROWTH_REQUESTS, MIN_GROWTH_OF_NUMBER * early)
        is_growing |= growth > MIN_GROWTH_SHARE * rate and late - early > least
    verdict = Verdict.OVERLOADED if is_growing else Verdict.STABLE
    stay_s = float(np.median(result.e2e_s[kept] - result.ttft_s[kept]))
    is_clear = is_growing and growths[0] > CLEAR_GROWTH_SHARE * rate
    if span_s < MIN_LIFETIMES * stay_s and not is_clear:
        verdict = Verdict.TOO_SHORT
    return Load(verdict=verdict, growth_before_first_token=growths[0], growth_in_decode=growths[1])


def _mean_number(begin: Floats, end: Floats, low: float, high: float) -> float:
    overlap = np.minimum(end, high) - np.maximum(begin, low)
    return float(np.maximum(overlap, 0.0).sum() / (high - low))


def _summarise_class(
    slo: TrafficClass, result: SimulationResult, members: Any, met: Any
) -> ClassSummary:
    num = int(members.sum())
    ttft_met = result.ttft_s[members] <= slo.ttft_s
    tpot_met = result.tpot_s[members] <= slo.tpot_s
    attainment = _mean(met[members])
    return ClassSummary(
        name=slo.name,
        num_requests=num,
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        target=slo.attainment,
        attainment_ttft=_mean(ttft_met),
        attainment_tpot=_mean(tpot_met),
        attainment=attainment,
        interval=attainment_interval(met[members]),
        is_met=bool(num and attainment >= slo.attainment),
    )


def _utilisation(
    config: SimulationConfig, result: SimulationResult, duration_s: float
) -> tuple[float, ...]:
    shares, first = [], 0
    for pool in config.pools:
        busy_s = result.busy_s[first : first + pool.replicas]
        first += pool.replicas
        shares.append(_ratio(float(busy_s.mean()) if len(busy_s) else 0.0, duration_s))
    return tuple(shares)


def _percentiles(values: Floats) -> dict[str, float]:
    if len(values) == 0:
        return {f"p{p}": math.nan for p in PERCENTILES}
    # Between finite and infinite there is no line to interpolate on.
    method = "linear" if np.isfinite(values).all() else "higher"
    found = np.percentile(values, PERCENTILES, method=method)  # type: ignore[call-overload]
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else 0.0


def clean(value: object) -> object:
    """What JSON cannot hold, infinite and undefined numbers, becomes None."""
    if isinstance(value, dict):
        return {name: clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
