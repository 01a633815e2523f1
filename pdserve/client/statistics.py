"""From the records of a load run to the numbers of a report."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.domain.tokens import PhaseTimeline

PERCENTS = (50, 90, 99)
PHASES = (
    "router_queue_s",
    "reserve_s",
    "prefill_queue_s",
    "prefill_s",
    "handoff_wait_s",
    "decode_queue_s",
    "decode_s",
)
"""The phases that follow one another; `transfer_s` overlaps prefill and is reported beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What one request of a load run met. Times count from its planned arrival, at the client."""

    index: int
    arrival_s: float  # planned, from the start of the run
    prompt_tokens: int
    late_s: float = 0.0  # sent this long after its planned arrival: the generator's own delay
    ttft_s: float | None = None
    tpot_s: float | None = None  # None for an answer of one token
    e2e_s: float | None = None
    output_tokens: int = 0
    timeline: PhaseTimeline | None = None
    failure: str = ""  # a reason of the table of errors; empty: answered in full

    @property
    def is_ok(self) -> bool:
        return not self.failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service-level objectives of one request; None asks nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def is_met_by(self, record: RequestRecord) -> bool:
        """Whether the request ended well and within both; one token has no gap to judge."""
        return (
            record.is_ok
            and _is_within(record.ttft_s, self.ttft_s)
            and _is_within(record.tpot_s, self.tpot_s)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A load run in numbers; seconds. Percentiles count requests that ended well.

    `goodput` is the requests/s that met every objective, `attainment` their share of all that
    were sent, failed ones included. `phase_share` maps a phase to its share of all requests' time.
    """

    num_requests: int
    num_ok: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: Mapping[int, float]
    tpot_s: Mapping[int, float]
    e2e_s: Mapping[int, float]
    late_s: Mapping[int, float]
    slo: Slo
    attainment: float
    goodput: float
    failures: Mapping[str, int]
    phase_share: Mapping[str, float]
    handoff_share: float  # of requests' time, what the passage to the decode worker added
    transfer_s: Mapping[int, float]  # first block asked for to last block checked
    transferred_bytes: int
    records: Sequence[RequestRecord] = field(repr=False)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarise(records: Sequence[RequestRecord], slo: Slo, duration_s: float) -> LoadReport:
    """`duration_s`: from the first planned arrival to the end of the last request."""
    ok = [record for record in records if record.is_ok]
    timelines = [record.timeline for record in ok if record.timeline is not None]
    num_good = sum(slo.is_met_by(record) for record in records)
    shares = phase_shares(timelines)
    return LoadReport(
        num_requests=len(records),
        num_ok=len(ok),
        duration_s=duration_s,
        requests_per_s=len(ok) / duration_s,
        output_tokens_per_s=sum(record.output_tokens for record in ok) / duration_s,
        ttft_s=_percentiles([r.ttft_s for r in ok]),
        tpot_s=_percentiles([r.tpot_s for r in ok]),
        e2e_s=_percentiles([r.e2e_s for r in ok]),
        late_s=_percentiles([r.late_s for r in records]),
        slo=slo,
        attainment=num_good / len(records) if records else math.nan,
        goodput=num_good / duration_s,
        failures=dict(Counter(r.failure for r in records if not r.is_ok).most_common()),
        phase_share=shares,
        handoff_share=shares["handoff_wait_s"],
        transfer_s=_percentiles([t.transfer_s for t in timelines if t.prefill_worker]),
        transferred_bytes=sum(t.transferred_bytes for t in timelines),
        records=tuple(records),
    )


def phase_shares(timelines: Sequence[PhaseTimeline]) -> dict[str, float]:
    """Each phase's share of the requests' time at the router; `other_s` is what no phase claims."""
    total_s = sum(timeline.total_s for timeline in timelines)
    sums = {name: sum(getattr(t, name) for t in timelines) for name in PHASES}
    sums["other_s"] = max(0.0, total_s - sum(sums.values()))
    # Clocks of several processes meet here: their sum, not the router's total, makes 100 %.
    whole = sum(sums.values())
    return {name: part / whole if whole else 0.0 for name, part in sums.items()}


def _percentiles(values: Sequence[float | None]) -> dict[int, float]:
    known = [value for value in values if value is not None]
    return {percent: percentile(known, percent) for percent in PERCENTS}


def _is_within(value: float | None, limit: float | None) -> bool:
    return limit is None or value is None or value <= limit
