"""The figures that are compared, from a simulation and from a load run."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

import numpy as np

from bench.plan_vs_real.workload import MEAN_PROMPT_TOKENS, draw_requests, to_trace
from pdserve.client.statistics import RequestRecord, Slo, percentile
from pdserve.client.workload import TraceRequest
from pdserve.domain.latency import StepShape
from placement.fitted_profile import FittedProfile
from placement.fitting import Phase
from placement.simulate import Simulator, attained
from placement.simulation.trace import Times
from placement.simulation.values import SimulationConfig, TrafficClass

TARGET = 0.9
NUM_CAPACITY_REQUESTS = 4000
CAPACITY_STEPS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Seconds, and the share of requests that met both objectives."""

    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    attainment: float

    @classmethod
    def median_of(cls, all_figures: Sequence["Figures"]) -> "Figures":
        names = [field.name for field in fields(cls)]
        return cls(**{name: median(getattr(each, name) for each in all_figures) for name in names})


def objectives(profile: FittedProfile) -> TrafficClass:
    """Tight enough to be missed near capacity: a few times what an idle cluster needs."""
    alone = step_times(profile)
    return TrafficClass(
        ttft_s=round(4 * (alone["prefill"] + profile.handoff.handoff_s), 3),
        tpot_s=round(2 * alone["decode"], 4),
        attainment=TARGET,
    )


def step_times(profile: FittedProfile) -> dict[Phase, float]:
    """Seconds of the bench's mean prompt, and of a step of four answers."""
    prompt, four = StepShape.of([(0, MEAN_PROMPT_TOKENS)]), StepShape.of((), [260] * 4)
    return {
        "prefill": profile.coefficients("prefill").step_s(prompt),
        "decode": profile.coefficients("decode").step_s(four),
    }


def predict(profile: FittedProfile, slo: TrafficClass, requests: Sequence[TraceRequest]) -> Figures:
    """What the simulator says of one prefill and one decode worker under rules pdserve."""
    times = _simulate(profile, slo, requests)
    return Figures(
        ttft_p50_s=float(np.percentile(times.ttft_s, 50)),
        ttft_p90_s=float(np.percentile(times.ttft_s, 90)),
        tpot_p50_s=float(np.percentile(times.tpot_s, 50)),
        tpot_p90_s=float(np.percentile(times.tpot_s, 90)),
        attainment=attained(times, slo),
    )


def measured(records: Sequence[RequestRecord], slo: TrafficClass) -> Figures:
    """The same of a load run; a request that failed met nothing."""
    limits = Slo(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s)
    ttft_s = [each.ttft_s for each in records if each.ttft_s is not None and each.is_ok]
    tpot_s = [each.tpot_s for each in records if each.tpot_s is not None and each.is_ok]
    return Figures(
        ttft_p50_s=percentile(ttft_s, 50),
        ttft_p90_s=percentile(ttft_s, 90),
        tpot_p50_s=percentile(tpot_s, 50),
        tpot_p90_s=percentile(tpot_s, 90),
        attainment=sum(limits.is_met_by(each) for each in records) / len(records),
    )


def capacity(profile: FittedProfile, slo: TrafficClass) -> float:
    """The highest rate at which the simulator sees the target attained, by bisection."""

    def is_attained(rate: float) -> bool:
        requests = draw_requests(NUM_CAPACITY_REQUESTS, rate, seed=0)
        return attained(_simulate(profile, slo, requests), slo) >= TARGET

    low, high = 0.0, 1.0
    while is_attained(high):
        low, high = high, 2 * high
    for _ in range(CAPACITY_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_attained(middle) else (low, middle)
    return low


def _simulate(profile: FittedProfile, slo: TrafficClass, requests: Sequence[TraceRequest]) -> Times:
    pools = profile.pools(num_prefill=1, num_decode=1)
    config = SimulationConfig(pools=pools, slo=(slo,), pdserve=profile.options())
    return Simulator(config).run(to_trace(requests))
