"""The cheapest design (in money, power or GPUs) that keeps its promises at a given rate.

For each pair of cuts: as prefill workers are added, the fewest decode workers that do can only
fall, so one walk along that staircase sees every minimal pair. A row of it is skipped where its
largest design that would still be cheaper than the best fails.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from placement.search.designs import Design, Worker
from placement.search.maximise import MAX_ROUNDS, Contest
from placement.search.space import Space
from placement.simulation.values import PoolRole

Price = Callable[[Design], float]
EPSILON = 1e-9
GUESS_SLACK = 1.5  # a pair of cuts is left out where its guess costs so much more than the best
MAX_SWEPT = 600  # designs cheaper than the best, all of which are looked at where there are no more
SMALL_JOBS, SMALL_SLACK = 80, 4.0  # so few pairs may be looked at more closely


@dataclass(slots=True)
class Bargain:
    """One search at one rate. It shares simulations, blame and tally with a `Contest`."""

    space: Space
    contest: Contest
    price: Price
    rate: float
    best: Design | None = None
    best_price: float = math.inf
    _known: dict[Design, bool] = field(default_factory=dict)

    def run(self) -> None:
        """All pairs of cuts and all colocated ones, the cheapest guesses first."""
        jobs: list[tuple[float, int, Callable[[], None]]] = []
        for worker in self.space.of_role(PoolRole.COLOCATED):
            for tokens in self.space.bounds:
                guess = self._guess_alone(worker, tokens)
                jobs.append((guess, len(jobs), partial(self._alone, worker, tokens)))
        for reader in self.space.of_role(PoolRole.PREFILL):
            for writer in self.space.of_role(PoolRole.DECODE):
                guess = self._guess_pair(reader, writer)
                jobs.append((guess, len(jobs), partial(self._pair, reader, writer)))
        self.contest.tally.listed += len(jobs)
        slack = SMALL_SLACK if len(jobs) <= SMALL_JOBS else GUESS_SLACK
        for guess, _, job in sorted(jobs, key=lambda item: item[:2]):
            if guess <= self.best_price * slack:
                job()
            else:
                self.contest.tally.by_estimate += 1

    def climb(self) -> None:
        """Cheaper neighbours, mixed ones among them, until there is none that holds."""
        for _ in range(MAX_ROUNDS):
            before = self.best
            if before is None:
                return
            self.consider(self.space.steps(before))
            if self.best == before:
                return

    def sweep(self) -> None:
        """Every cheaper design there can be, where they are few: pools of several GPU types too.

        From the cheapest up, so that the first that holds is the least.
        """
        if self.best is None:
            return
        designs = self.space.cheaper(self.best, self.price, MAX_SWEPT)
        if designs is None:
            return
        self.contest.tally.listed += len(designs)
        for design in designs:
            if self.holds(design):
                self._take(design)
                return

    def consider(self, designs: Iterable[Design]) -> None:
        """Take the cheapest of some designs that holds, if it is cheaper than the best."""
        for design in sorted(designs, key=lambda item: (self.price(item), item.key)):
            if self._is_cheaper(design) and self.holds(design):
                self._take(design)

    def holds(self, design: Design) -> bool:
        """Whether promises are kept at the rate; each design is asked once."""
        if design not in self._known:
            self._known[design] = self._ask(design)
        return self._known[design]

    def _ask(self, design: Design) -> bool:
        if not self.space.fits(design) or not design.is_complete:
            return False
        if self.space.rate_bound(design) < self.rate:
            self.contest.tally.by_bound += 1
            return False
        if self.contest._is_blamed(design, self.rate):
            self.contest.tally.by_blame += 1
            return False
        self.contest.tally.simulated += 1
        # On all seeds at once: no other rate will show that a near miss was an unlucky trace.
        num_seeds = self.contest.evaluator.num_seeds
        is_held = self.contest.reaches(design, self.rate, num_seeds=num_seeds)
        return is_held and self.contest.is_placeable(design, self.rate)

    def _is_cheaper(self, design: Design) -> bool:
        return self.price(design) < self.best_price * (1 - EPSILON)

    def _take(self, design: Design) -> None:
        self.best, self.best_price = design, self.price(design)
        self.contest.tally.trail.append((design, self.best_price))

    def _guess_alone(self, worker: Worker, tokens: int) -> float:
        each = self.space.bounds[tokens].single_estimate(worker)
        count = math.ceil(self.rate / each) if each > 0 else 10**6
        return self.price(self.space.design({worker: count}, tokens))

    def _guess_pair(self, reader: Worker, writer: Worker) -> float:
        bounds = self.space.bounds[next(iter(self.space.bounds))]
        counts = {}
        for worker in (reader, writer):
            each = bounds.single_estimate(worker)
            counts[worker] = math.ceil(self.rate / each) if each > 0 else 10**6
        return self.price(self.space.design(counts))

    def _alone(self, worker: Worker, tokens: int) -> None:
        most = self.space.max_count(worker)
        self._descend(lambda n: self.space.design({worker: n}, tokens), 1, most)

    def _pair(self, reader: Worker, writer: Worker) -> None:
        bounds = self.space.bounds[next(iter(self.space.bounds))]
        needed = self.rate * min((s.attainment for s in bounds.slo), default=0.5)
        least_m = math.ceil(needed / (bounds.prefill_bound(reader)) - EPSILON)
        least_n = math.ceil(needed / max(bounds.decode_bound(writer), 1e-9) - EPSILON)
        start_m = max(math.ceil(self.rate / max(bounds.single_estimate(reader), 1e-9)), 1)
        most_m, most_n = self.space.max_count(reader), self.space.max_count(writer)
        least_m, least_n = max(least_m, 1), max(least_n, 1)
        # The guess first, so that the staircase has a price to stay below.
        for m in sorted(range(least_m, most_m + 1), key=lambda m: (abs(m - start_m), m)):
            cheapest = self.space.design({reader: m, writer: least_n})
            if not self._is_cheaper(cheapest):
                if m > start_m:
                    break
                continue
            self._descend(
                lambda n, m=m: self.space.design({reader: m, writer: n}),  # type: ignore[misc]
                least_n,
                most_n,
            )

    def _descend(self, make: Callable[[int], Design], least: int, most: int) -> None:
        """The fewest workers of one kind that hold, where that beats the best price."""
        high = most
        while high >= least and not (self._is_cheaper(make(high)) and self.space.fits(make(high))):
            high -= 1
        if high < least:
            return
        if not math.isfinite(self.best_price):
            high = self._gallop(make, least, high)
        if high < least or not self.holds(make(high)):
            return
        self._take(make(high))
        low = least
        while low < high:
            middle = (low + high) // 2
            if self.holds(make(middle)):
                high = middle
                self._take(make(high))
            else:
                low = middle + 1

    def _gallop(self, make: Callable[[int], Design], least: int, most: int) -> int:
        """Without a price to beat yet: the first count that holds, in growing steps."""
        step, count = 1, least
        while count < most and not self.holds(make(count)):
            count, step = min(count + step, most), step * 2
        return count

    def refuse(self, design: Design) -> None:
        """Forget the best: on all seeds it does not hold."""
        self._known[design] = False
        self.best, self.best_price = None, math.inf
