"""Simulating candidates: the same traces for all, each run kept, rates searched.

Runs are kept by everything that they depend on within a problem: design, rate, seed, horizon.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from pdserve.domain.errors import LocalFault
from placement.search.designs import Design, single_losses
from placement.search.judging import LOST, Judge, Margin
from placement.search.traffic import Traffic
from placement.simulate import Simulator
from placement.simulation.trace import Ints, Times, Trace
from placement.simulation.values import Rules, SimulationConfig, TrafficClass

T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t by degrees of freedom, from 1."""
MAX_STEPS = 24
MAX_SIMULATORS = 64
SEARCH_REQUESTS = 9_000
SEARCH_SPANS = ((150.0, 30_000), (40.0, 100_000))  # seconds, or what so many requests take
SEARCH_SEEDS = 2
CLEARLY_LOST = -0.08  # one loss that misses by so much: the others need not be looked at


def interval_of_mean(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent runs; of one run, everything."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return (-math.inf, math.inf)
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
    half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return (mean - half, mean + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """The highest rate found that keeps the promises, and its interval."""

    rate: float
    interval: tuple[float, float]
    margins: tuple[float, ...]  # at that rate, by seed

    def at_most(self, rate: float) -> "Goodput":
        """No more than something else than promises allows."""
        if self.rate <= rate:
            return self
        return replace(self, rate=rate, interval=(rate, rate))


NO_GOODPUT = Goodput(rate=0.0, interval=(0.0, 0.0), margins=())


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Simulates designs of one problem; `num_runs` and `num_requests` count the work."""

    traffic: Traffic
    judge: Judge
    base: SimulationConfig  # rules, promises and options of every design, whose pools are its own
    horizon_s: float
    num_seeds: int
    spare_workers: int = 0
    on_run: Callable[[int], None] | None = None
    num_runs: int = field(default=0, init=False)
    num_requests: int = field(default=0, init=False)
    _margins: dict[tuple[object, ...], Margin] = field(default_factory=dict, init=False)
    _simulators: dict[Design, Simulator | None] = field(default_factory=dict, init=False)

    @property
    def rules(self) -> Rules:
        return self.base.rules

    @property
    def slo(self) -> tuple[TrafficClass, ...]:
        return self.base.slo

    def with_traffic(self, traffic: Traffic) -> "Evaluator":
        """The same for other requests, with no worker to spare."""
        return replace(self, traffic=traffic, spare_workers=0)

    def config(self, design: Design) -> SimulationConfig:
        return design.config(self.base)

    def run(
        self, design: Design, rate: float, seed: int, horizon_s: float | None = None
    ) -> tuple[Times, Trace, Ints] | None:
        """One simulation; None where the design cannot hold some request."""
        if not design.is_complete:
            return None
        simulator = self._simulator(design)
        if simulator is None:
            return None
        trace, classes = self.traffic.trace(seed, rate, horizon_s or self.horizon_s)
        try:
            times = simulator.run(trace, ttft_s=self.base.promises_s[classes])
        except LocalFault:
            return None
        self.num_runs += 1
        self.num_requests += len(trace)
        if self.on_run is not None:
            self.on_run(self.num_runs)
        return times, trace, classes

    def _simulator(self, design: Design) -> Simulator | None:
        if design not in self._simulators:
            if len(self._simulators) >= MAX_SIMULATORS:
                self._simulators.pop(next(iter(self._simulators)))
            try:
                self._simulators[design] = Simulator(self.config(design))
            except LocalFault:
                self._simulators[design] = None
        return self._simulators[design]

    def margin(
        self, design: Design, rate: float, seed: int, horizon_s: float | None = None
    ) -> Margin:
        """Of one run; with a spare worker asked for, the worst after the loss of any one."""
        if self.spare_workers:
            found = []
            for _, after in single_losses(design):
                margin = self.margin_as_is(after, rate, seed, horizon_s)
                found.append(margin)
                if margin.all < CLEARLY_LOST:
                    break
            worst = min(found, key=lambda item: item.all, default=LOST)
            return Margin(
                all=worst.all,
                ttft=min(item.ttft for item in found),
                tpot=min(item.tpot for item in found),
                attainment=worst.attainment,
            )
        return self.margin_as_is(design, rate, seed, horizon_s)

    def margin_as_is(
        self, design: Design, rate: float, seed: int, horizon_s: float | None = None
    ) -> Margin:
        horizon_s = horizon_s or self.horizon_s
        key = (design.key, rate, seed, horizon_s)
        if key not in self._margins:
            done = self.run(design, rate, seed, horizon_s)
            self._margins[key] = LOST if done is None else self.judge(*done)
        return self._margins[key]

    def holds(
        self, design: Design, rate: float, num_seeds: int, horizon_s: float | None = None
    ) -> bool:
        """Whether the promises are kept at a rate, on average; gives up early where it can."""
        total = 0.0
        best = 1.0 - min((item.attainment for item in self.slo), default=0.0)
        for seed in range(num_seeds):
            total += self.margin(design, rate, seed, horizon_s).all
            left = num_seeds - seed - 1
            if total + left * best < 0:
                return False
        return total >= 0

    def search_horizon_s(self, rate: float) -> float:
        """Long enough to rank designs: the whole horizon, or less where requests are many."""
        spans = (min(span_s, most / rate) for span_s, most in SEARCH_SPANS)
        return min(self.horizon_s, max(SEARCH_REQUESTS / rate, *spans))

    @property
    def search_seeds(self) -> int:
        return min(self.num_seeds, SEARCH_SEEDS)

    def goodput(
        self,
        design: Design,
        guess: float,
        *,
        num_seeds: int,
        tolerance: float,
        horizon_s: float | None = None,
        factor: float = 1.06,
    ) -> Goodput:
        """Search the highest rate whose mean margin is at least 0, to a relative tolerance.

        Bracket from the guess, then interpolate the margin, kept off the bracket's ends.
        """
        tested: dict[float, float] = {}

        def test(rate: float) -> float:
            if rate not in tested:
                margins = [self.margin(design, rate, s, horizon_s).all for s in range(num_seeds)]
                tested[rate] = float(np.mean(margins))
            return tested[rate]

        low, high = _bracket(test, guess, factor)
        if low == 0.0:
            return NO_GOODPUT
        for _ in range(MAX_STEPS):
            if high - low <= tolerance * low:
                break
            below, above = max(test(low), 0.0), min(test(high), -1e-6)
            share = below / (below - above)
            # A steep fall above makes the line useless: stay in the middle half.
            middle = low + (high - low) * min(max(share, 0.25), 0.75)
            if test(middle) >= 0:
                low = middle
            else:
                high = middle
        margins = [self.margin(design, low, s, horizon_s).all for s in range(num_seeds)]
        slope = (test(low) - test(high)) / (high - low)
        lower, upper = interval_of_mean(margins)
        mean = float(np.mean(margins))
        # The margin's spread, turned into a rate by the slope next to the limit.
        down = (mean - lower) / slope if slope > 0 and math.isfinite(lower) else 0.0
        up = (upper - mean) / slope if slope > 0 and math.isfinite(upper) else 0.0
        return Goodput(
            rate=low,
            interval=(max(low - down, 0.0), max(high, low + up)),
            margins=tuple(margins),
        )


def _bracket(test: Callable[[float], float], guess: float, factor: float) -> tuple[float, float]:
    """A rate that holds and a higher one that does not; (0, x) where none above guess/50 holds."""
    low, high = 0.0, 0.0
    rate = max(guess, 1e-3)
    if test(rate) >= 0:
        low = rate
        while True:
            rate *= factor
            if test(rate) < 0:
                return low, rate
            low, factor = rate, min(factor * 1.15, 2.0)
    high = rate
    while rate > guess / 50:
        rate /= factor
        if test(rate) >= 0:
            return rate, high
        high, factor = rate, min(factor * 1.15, 2.0)
    return 0.0, high
