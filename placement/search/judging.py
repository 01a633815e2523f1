"""Whether a run kept its promises, as one number: the least margin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from placement.simulation.timing import SplitwiseTiming, interpolate
from placement.simulation.trace import Floats, Ints, Times, Trace
from placement.simulation.values import TrafficClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """One of Splitwise's nine limits: a percentile of a time over that of one machine alone."""

    name: str  # such as TTFT p90
    value: float
    limit: float

    @property
    def room(self) -> float:
        """Share of the limit that is left; strictly below is kept, so a value at it has none."""
        left = 1 - self.value / self.limit
        return left if left > 0 else min(left, -1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """How far a run is from its promises; 0 and more is kept.

    `all` is the least over the classes of attainment less target, both promises together; `ttft`
    and `tpot` the same for each alone. `attainment` is of all requests. `slowdowns` are there where
    the promises are Splitwise's.
    """

    all: float
    ttft: float
    tpot: float
    attainment: float
    slowdowns: tuple[Slowdown, ...] = ()

    @property
    def binding(self) -> str:
        """The promise that gives way first."""
        if self.slowdowns:
            return min(self.slowdowns, key=lambda item: item.room).name
        return "TTFT" if self.ttft <= self.tpot else "TPOT"

    @property
    def miss(self) -> str:
        """How far the binding promise is from being kept, in a few words."""
        if self.slowdowns:
            worst = min(self.slowdowns, key=lambda item: item.room)
            return f"{worst.name} slowdown {worst.value:.3g}, limit {worst.limit:g}"
        return f"{self.binding}: attainment {self.attainment:.0%}"


LOST = Margin(all=-1.0, ttft=-1.0, tpot=-1.0, attainment=0.0)
Judge = Callable[[Times, Trace, Ints], Margin]


def class_judge(slo: Sequence[TrafficClass]) -> Judge:
    """Joint attainment of each class against its target."""

    def judge(times: Times, trace: Trace, class_index: Ints) -> Margin:
        least, least_ttft, least_tpot, num_met = 1.0, 1.0, 1.0, 0
        for index, item in enumerate(slo):
            ttft_met = times.ttft_s <= item.ttft_s
            tpot_met = times.tpot_s <= item.tpot_s
            if len(slo) > 1:
                members = class_index == index
                ttft_met, tpot_met = ttft_met[members], tpot_met[members]
            if len(ttft_met) == 0:
                continue
            met = ttft_met & tpot_met
            num_met += int(met.sum())
            least = min(least, float(met.mean()) - item.attainment)
            least_ttft = min(least_ttft, float(ttft_met.mean()) - item.attainment)
            least_tpot = min(least_tpot, float(tpot_met.mean()) - item.attainment)
        return Margin(
            all=least, ttft=least_ttft, tpot=least_tpot, attainment=num_met / max(len(trace), 1)
        )

    return judge


TTFT_LIMITS = (2.0, 3.0, 6.0)
TBT_LIMITS = (1.25, 1.5, 5.0)
PERCENTILES = (50, 90, 99)


def slowdown_judge(reference: SplitwiseTiming, token_s: Callable[[Ints], Floats]) -> Judge:
    """Splitwise's nine limits: slowdown of TTFT, TBT, E2E at p50, p90, p99 against one A100
    machine alone. `token_s` is its time of one token for each prompt length."""

    def judge(times: Times, trace: Trace, class_index: Ints) -> Margin:
        prompt_s = interpolate(reference.tokens, reference.prompt_s, trace.prompts)
        alone_s = token_s(trace.prompts)
        whole_s = prompt_s + alone_s * (trace.outputs - 1)
        ttft = _slowdowns("TTFT", times.ttft_s / prompt_s, TTFT_LIMITS)
        tbt = _slowdowns("TBT", times.tpot_s / alone_s, TBT_LIMITS)
        e2e = _slowdowns("E2E", times.e2e_s / whole_s, TBT_LIMITS)
        if not (ttft and tbt and e2e):
            return LOST
        least = min(_room(ttft), _room(tbt), _room(e2e))
        return Margin(
            all=least,
            ttft=_room(ttft),
            tpot=_room(tbt),
            attainment=1.0 if least > 0 else 0.0,
            slowdowns=ttft + tbt + e2e,
        )

    return judge


def splitwise_token_s(reference: SplitwiseTiming) -> Callable[[Ints], Floats]:
    """The reference reads the token time at the prompt's length."""
    return lambda prompts: interpolate(reference.tokens, reference.token_s, prompts)


def _slowdowns(name: str, found: Floats, limits: tuple[float, ...]) -> tuple[Slowdown, ...]:
    """At each percentile; nothing where a request was refused, or where there are none."""
    if len(found) == 0 or not np.isfinite(found).all():
        return ()
    values = np.percentile(found, PERCENTILES)
    return tuple(
        Slowdown(name=f"{name} p{percentile}", value=float(value), limit=limit)
        for percentile, value, limit in zip(PERCENTILES, values, limits, strict=True)
    )


def _room(slowdowns: tuple[Slowdown, ...]) -> float:
    return min(item.room for item in slowdowns)
