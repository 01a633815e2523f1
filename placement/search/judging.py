"""Whether a run kept its promises, as one number: the least margin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from placement.simulation.timing import SplitwiseTiming
from placement.simulation.trace import Floats, Ints, Times, Trace
from placement.simulation.values import SloClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """How far a run is from its promises; 0 and more is kept.

    `all` is the least over the classes of attainment less target, both promises together; `ttft`
    and `tpot` the same for each alone. `attainment` is of all requests.
    """

    all: float
    ttft: float
    tpot: float
    attainment: float


LOST = Margin(all=-1.0, ttft=-1.0, tpot=-1.0, attainment=0.0)
Judge = Callable[[Times, Trace, Ints], Margin]


def class_judge(slo: Sequence[SloClass]) -> Judge:
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
        prompt_s = _curve(reference.tokens, reference.prompt_s, trace.prompts)
        alone_s = token_s(trace.prompts)
        ttft = _room(times.ttft_s / prompt_s, TTFT_LIMITS)
        tbt = _room(times.tpot_s / alone_s, TBT_LIMITS)
        whole_s = prompt_s + alone_s * (trace.outputs - 1)
        e2e = _room(times.e2e_s / whole_s, TBT_LIMITS)
        least = min(ttft, tbt, e2e)
        return Margin(all=least, ttft=ttft, tpot=tbt, attainment=1.0 if least > 0 else 0.0)

    return judge


def splitwise_token_s(reference: SplitwiseTiming) -> Callable[[Ints], Floats]:
    """The reference reads the token time at the prompt's length."""
    return lambda prompts: _curve(reference.tokens, reference.token_s, prompts)


def _room(slowdown: Floats, limits: tuple[float, ...]) -> float:
    if len(slowdown) == 0 or not np.isfinite(slowdown).all():
        return -1.0
    found = np.percentile(slowdown, PERCENTILES)
    # Strictly below: a slowdown at its limit fails.
    room = min(float(1 - value / limit) for value, limit in zip(found, limits, strict=True))
    return room if room > 0 else min(room, -1e-9)


def _curve(knots: Floats, values: Floats, at: Ints) -> Floats:
    left = np.clip(np.searchsorted(knots, at) - 1, 0, len(knots) - 2)
    slope = (values[left + 1] - values[left]) / (knots[left + 1] - knots[left])
    line: Floats = slope * (at - knots[left]) + values[left]
    return line
