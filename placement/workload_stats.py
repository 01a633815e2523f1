"""What is in a workload: lengths, arrivals, shared prefixes; and distributions that fit it."""

import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from placement.demand import (
    ArrivalProcess,
    Floats,
    Ints,
    Lengths,
    SharedPrefix,
    Workload,
    WorkloadSpec,
)

PERCENTILES = (50, 90, 95, 99)
WINDOWS_S = (1, 10, 60)
MIN_PREFIX_SHARE = 0.01
LENGTH_NAMES = ("mean", "std", "min", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStats:
    mean: float
    std: float
    min: int
    p50: float
    p90: float
    p95: float
    p99: float
    max: int

    @property
    def cv(self) -> float:
        return self.std / self.mean if self.mean else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalStats:
    """In seconds and requests/s; in units of the mean gap where the times are not recorded."""

    is_recorded: bool
    duration_s: float
    rate: float
    gap_cv: float
    longest_gap_s: float
    peak_minute_ratio: float  # against the mean minute
    dispersion: dict[str, float]  # variance / mean of counts by window


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    num_blocks: int
    num_distinct_blocks: int
    block_tokens: int
    ideal_hit_share: float  # of prompt tokens, with an endless cache


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadStats:
    num_requests: int
    prompt_tokens: LengthStats
    output_tokens: LengthStats
    prompt_to_output: float
    correlation: float  # of prompt and output lengths
    arrivals: ArrivalStats
    prefix: PrefixStats | None

    def length_rows(self) -> list[tuple[str, list[str]]]:
        """For a table: of prompts and of outputs the texts of `LENGTH_NAMES`."""
        lengths = {"prompt": self.prompt_tokens, "output": self.output_tokens}
        return [
            (name, [_number(getattr(item, field)) for field in LENGTH_NAMES])
            for name, item in lengths.items()
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(workload: Workload) -> WorkloadStats:
    """Measure a workload."""
    prompts, outputs = workload.prompt_tokens, workload.output_tokens
    is_varied = len(workload) > 1 and float(prompts.std()) > 0 and float(outputs.std()) > 0
    return WorkloadStats(
        num_requests=len(workload),
        prompt_tokens=length_stats(prompts),
        output_tokens=length_stats(outputs),
        prompt_to_output=float(prompts.sum() / max(outputs.sum(), 1)),
        correlation=float(np.corrcoef(prompts, outputs)[0, 1]) if is_varied else 0.0,
        arrivals=_arrival_stats(workload),
        prefix=_prefix_stats(workload),
    )


def length_stats(values: Ints) -> LengthStats:
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, PERCENTILES))
    return LengthStats(
        mean=float(values.mean()),
        std=float(values.std()),
        min=int(values.min()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=int(values.max()),
    )


def fit(workload: Workload, *, num_requests: int | None = None, seed: int = 0) -> WorkloadSpec:
    """Distributions with the workload's means, spreads, rate, burstiness and shared prefix."""
    stats = describe(workload)
    prefix = None
    if stats.prefix is not None and stats.prefix.ideal_hit_share > MIN_PREFIX_SHARE:
        prefix = _fit_prefix(workload, stats)
    return WorkloadSpec(
        num_requests=num_requests or len(workload),
        arrivals=ArrivalProcess(
            rate=_round(stats.arrivals.rate) or 1.0, cv=min(_round(stats.arrivals.gap_cv), 50.0)
        ),
        prompt_tokens=_fit_lengths(workload.prompt_tokens),
        output_tokens=_fit_lengths(workload.output_tokens),
        prefix=prefix,
        seed=seed,
    )


def histogram(values: Ints, *, num_bins: int = 12) -> list[tuple[float, float, int]]:
    """Counts in bins of equal ratio: (low, high, count), up to the 99.5th percentile and beyond."""
    low, high = max(float(values.min()), 1.0), float(np.percentile(values, 99.5)) + 1
    if high <= low * 1.5:
        edges = np.linspace(low, max(high, low + 1), num_bins + 1)
    else:
        edges = np.geomspace(low, high, num_bins + 1)
    edges[0], edges[-1] = min(edges[0], float(values.min())), float(values.max()) + 1
    counts, _ = np.histogram(values, bins=edges)
    return [(float(edges[i]), float(edges[i + 1]), int(count)) for i, count in enumerate(counts)]


def _arrival_stats(workload: Workload) -> ArrivalStats:
    is_recorded = workload.arrival_s is not None
    if workload.arrival_s is not None:
        arrival_s = workload.arrival_s - workload.arrival_s[0]
    else:
        arrival_s = np.cumsum(workload.gaps())
    gaps = np.diff(arrival_s)
    duration_s = float(arrival_s[-1])
    mean = float(gaps.mean()) if len(gaps) else 0.0
    minutes = _counts(arrival_s, 60.0)
    return ArrivalStats(
        is_recorded=is_recorded,
        duration_s=duration_s,
        rate=1 / mean if mean else 0.0,
        gap_cv=float(gaps.std() / mean) if mean else 0.0,
        longest_gap_s=float(gaps.max()) if len(gaps) else 0.0,
        peak_minute_ratio=float(minutes.max() / minutes.mean()) if len(minutes) else 1.0,
        dispersion={
            f"{window}s": _dispersion(_counts(arrival_s, float(window))) for window in WINDOWS_S
        },
    )


def _counts(arrival_s: Floats, window_s: float) -> Floats:
    """Requests in each whole window."""
    num = int(arrival_s[-1] // window_s)
    if num == 0:
        return np.zeros(0)
    index = (arrival_s // window_s).astype(np.int64)
    return np.bincount(index[index < num], minlength=num).astype(float)


def _dispersion(counts: Floats) -> float:
    return float(counts.var() / counts.mean()) if len(counts) > 1 and counts.mean() else math.nan


def _prefix_stats(workload: Workload) -> PrefixStats | None:
    starts, ids = workload.prefix_starts, workload.prefix_ids
    if starts is None or ids is None or len(ids) == 0:
        return None
    block = workload.prefix_block_tokens
    known = np.zeros(int(ids.max()) + 1, bool)
    hit_tokens = 0
    for request in range(len(workload)):
        blocks = ids[starts[request] : starts[request + 1]]
        seen = known[blocks]
        num = len(blocks) if seen.all() else int(seen.argmin())
        hit_tokens += min(num * block, int(workload.prompt_tokens[request]))
        known[blocks] = True
    return PrefixStats(
        num_blocks=len(ids),
        num_distinct_blocks=len(np.unique(ids)),
        block_tokens=block,
        ideal_hit_share=hit_tokens / float(workload.prompt_tokens.sum()),
    )


def _fit_prefix(workload: Workload, stats: WorkloadStats) -> SharedPrefix:
    """One prefix that saves as many tokens: the share that hits, and how much of it on average."""
    starts, ids = workload.prefix_starts, workload.prefix_ids
    assert starts is not None
    assert ids is not None
    assert stats.prefix is not None
    heads = ids[starts[:-1][np.diff(starts) > 0]]
    groups = OrderedDict(sorted(zip(*np.unique(heads, return_counts=True), strict=True)))
    num_shared = sum(int(count) for count in groups.values() if count > 1)
    share = max(num_shared / len(workload), MIN_PREFIX_SHARE)
    saved = stats.prefix.ideal_hit_share * stats.prompt_tokens.mean
    return SharedPrefix(
        share=_round(min(share, 1.0)),
        tokens=max(round(saved / share), 1),
        groups=max(sum(1 for count in groups.values() if count > 1), 1),
    )


def _fit_lengths(values: Ints) -> Lengths:
    """The more likely of lognormal and gamma, by moments, cut at what was seen."""
    stats = length_stats(values)
    if stats.std == 0:
        return Lengths(distribution="fixed", mean=_round(stats.mean), min=max(stats.min, 1))
    return Lengths(
        distribution=_likelier(values.astype(float), stats),
        mean=_round(max(stats.mean, 1e-3)),
        cv=min(_round(stats.cv), 20.0),
        min=max(stats.min, 1),
        max=max(stats.max, 1),
    )


def _likelier(values: Floats, stats: LengthStats) -> Literal["lognormal", "gamma"]:
    values = np.maximum(values, 1.0)
    variance = math.log1p(stats.cv**2)
    centre = math.log(stats.mean) - variance / 2
    logs = np.log(values)
    lognormal = -logs - 0.5 * math.log(2 * math.pi * variance) - (logs - centre) ** 2 / 2 / variance
    shape, scale = 1 / stats.cv**2, stats.mean * stats.cv**2
    gamma = (shape - 1) * logs - values / scale - shape * math.log(scale) - math.lgamma(shape)
    return "lognormal" if lognormal.sum() >= gamma.sum() else "gamma"


def _round(value: float) -> float:
    """Four digits: what a person can read, and more than a fit is worth."""
    return float(f"{value:.4g}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
