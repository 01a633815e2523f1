"""The design with the most goodput, in all or for each GPU.

Candidates come in the order of their estimates. Each has to beat the best so far: it is simulated
at the one rate at which it would, first on a short trace. A run that fails on one promise alone
speaks against every design with that pool or a smaller one, so that most fall without a run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from placement.search.designs import Counts, Design
from placement.search.evaluate import NO_GOODPUT, Evaluator, Goodput
from placement.search.links import is_placeable
from placement.search.space import Space
from placement.simulation.values import PoolRole, Rules

SHORT_SHARE = 0.2  # of the horizon, for the first look
SHORT_MARGIN = -0.08  # a short trace says no only this clearly
LONG_MARGIN = -0.025  # and one whole trace this clearly
SHORT_CLEAR, LONG_CLEAR = -0.3, -0.15  # so clearly that no second trace is asked
ESTIMATE_SLACK = 0.78  # of the best: an estimate below it is not simulated
SMALL_SPACE, SMALL_SLACK = 300, 0.35  # so few designs may be looked at more closely
TWICE_THE_LIMIT = -1.0  # a short trace so slow, by Splitwise's limits: its queues grow
MAX_ROUNDS = 12


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the candidates."""

    listed: int = 0
    by_bound: int = 0
    by_estimate: int = 0
    by_blame: int = 0
    simulated: int = 0
    trail: list[tuple[Design, float]] = field(default_factory=list)  # each best in its turn


@dataclass(frozen=True, slots=True)
class Look:
    """A share of the horizon, the mean margin below which it says no, and when at once."""

    share: float
    margin: float
    clear: float


@dataclass(slots=True)
class Blame:
    """Pools that failed a promise on their own, by step tokens, and the rates at which they did."""

    rates: dict[tuple[object, ...], list[tuple[tuple[int, ...], float]]] = field(
        default_factory=dict
    )

    def add(self, side: Counts, max_step_tokens: int, rate: float) -> None:
        kinds, counts = _split(side, max_step_tokens)
        self.rates.setdefault(kinds, []).append((counts, rate))

    def speaks_against(self, side: Counts, max_step_tokens: int, rate: float) -> bool:
        kinds, counts = _split(side, max_step_tokens)
        return any(
            rate >= failed and all(a <= b for a, b in zip(counts, others, strict=True))
            for others, failed in self.rates.get(kinds, ())
        )


def _split(side: Counts, max_step_tokens: int) -> tuple[tuple[object, ...], tuple[int, ...]]:
    kinds = (max_step_tokens, *(worker.key for worker, _ in side))
    return kinds, tuple(count for _, count in side)


@dataclass(slots=True)
class Contest:
    """One search: the best so far, and who is left to challenge it."""

    space: Space
    evaluator: Evaluator
    value: Callable[[Design, float], float]  # of a design at a goodput; linear in the goodput
    tolerance: float
    slack: float = ESTIMATE_SLACK
    is_small: bool = False  # so few designs that the best's steps are certified too
    tally: Tally = field(default_factory=Tally)
    blame: Blame = field(default_factory=Blame)
    unplaceable: set[Design] = field(default_factory=set)
    best: Design | None = None
    best_goodput: Goodput = NO_GOODPUT
    best_value: float = 0.0

    def run(self) -> None:
        """Judge all that is listed, then walk from the best until no step helps."""
        designs = list(self.space.listed())
        if len(designs) <= SMALL_SPACE:
            self.slack, self.is_small = SMALL_SLACK, True
        self.tally.listed += len(designs)
        self.consider(designs)

    def consider(self, designs: Iterable[Design]) -> None:
        """Let designs challenge the best, the most promising first."""
        rated = [(self.value(d, self.space.estimate(d)), d) for d in designs]
        rated.sort(key=lambda item: (-item[0], item[1].num_gpus, item[1].key))
        for guess, design in rated:
            # Where a promise is hardly kept unloaded, an estimate of 0 need not be the truth.
            if guess <= 0 and self.slack > SMALL_SLACK:
                self.tally.by_estimate += 1
                continue
            self.challenge(design, guess)

    def climb(self) -> None:
        """Step to better neighbours until there is none."""
        for _ in range(MAX_ROUNDS):
            before = self.best
            if before is None:
                return
            steps = list(self.space.steps(before))
            self.tally.listed += len(steps)
            self.consider(steps)
            if self.best == before:
                return

    def challenge(self, design: Design, guess: float) -> bool:
        """Whether `design` beats the best by more than the tolerance; it is then the best."""
        if design in self.unplaceable:
            return False
        if self.best is None:
            return self._crown(design, guess)
        goal = self.best_value * (1 + self.tolerance)
        needed = goal / max(self.value(design, 1.0), 1e-12)
        if self.space.rate_bound(design) < needed:
            self.tally.by_bound += 1
            return False
        if 0 < guess < self.best_value * self.slack:
            self.tally.by_estimate += 1
            return False
        if self._is_blamed(design, needed):
            self.tally.by_blame += 1
            return False
        self.tally.simulated += 1
        if not self.reaches(design, needed):
            return False
        return self._crown(design, needed * (1 + self.tolerance))

    def reaches(self, design: Design, rate: float, *, num_seeds: int | None = None) -> bool:
        """Whether promises hold at a rate: a short look, a long one, then as many seeds as rank
        designs. Where `num_seeds` are given, these decide, and looks only tell what is clear."""
        if self.evaluator.rules is Rules.SPLITWISE or not self.evaluator.slo:
            horizon_s = self.evaluator.horizon_s * SHORT_SHARE
            if self.evaluator.margin(design, rate, 0, horizon_s).all < TWICE_THE_LIMIT:
                return False
            return self.evaluator.holds(design, rate, self.evaluator.num_seeds)
        horizon_s = self.evaluator.search_horizon_s(rate)
        looks: tuple[Look, ...] = (
            Look(SHORT_SHARE, SHORT_MARGIN, SHORT_CLEAR),
            Look(1.0, LONG_MARGIN, LONG_CLEAR),
        )
        if num_seeds is not None:
            looks = tuple(replace(look, margin=look.clear) for look in looks)
        if not all(self._passes(look, design, rate, horizon_s) for look in looks):
            return False
        num_seeds = num_seeds or self.evaluator.search_seeds
        return self.evaluator.holds(design, rate, num_seeds, horizon_s)

    def _passes(self, look: Look, design: Design, rate: float, horizon_s: float) -> bool:
        """Whether one look does not speak against a design; one trace alone may be unlucky."""
        found = []
        for seed in range(self.evaluator.search_seeds):
            found.append(self.evaluator.margin(design, rate, seed, horizon_s * look.share))
            mean = sum(item.all for item in found) / len(found)
            if mean >= look.margin:
                return True
            if mean < look.clear:
                break
        ttft = sum(item.ttft for item in found) / len(found)
        tpot = sum(item.tpot for item in found) / len(found)
        # How requests reach a pool moves its margin: others with it are dropped where it is clear.
        self._assign_blame(design, rate, ttft, tpot, look.clear)
        return False

    def _crown(self, design: Design, guess: float) -> bool:
        rate = guess if self.best is not None else self.space.estimate(design)
        found = self.evaluator.goodput(
            design,
            rate,
            num_seeds=self.evaluator.search_seeds,
            tolerance=self.tolerance,
            horizon_s=self.evaluator.search_horizon_s(rate),
        ).at_most(self.space.link_rate(design))
        value = self.value(design, found.rate)
        if found.rate == 0.0 or value <= self.best_value:
            return False
        if not self.is_placeable(design, found.rate):
            return False
        self.best, self.best_goodput, self.best_value = design, found, value
        self.tally.trail.append((design, value))
        return True

    def is_placeable(self, design: Design, rate: float) -> bool:
        """Whether nodes and links hold it at a rate; one that they do not hold is out."""
        if design not in self.unplaceable and not is_placeable(
            self.evaluator, design, self.space.fleets, rate
        ):
            self.tally.by_bound += 1
            self.unplaceable.add(design)
        return design not in self.unplaceable

    def _is_blamed(self, design: Design, rate: float) -> bool:
        tokens = design.max_step_tokens
        return any(
            side and self.blame.speaks_against(side, tokens, rate) for side in self._sides(design)
        )

    def _sides(self, design: Design) -> tuple[Counts, ...]:
        if design.kind == "disaggregated":
            return design.side(PoolRole.PREFILL), design.side(PoolRole.DECODE)
        return (design.counts,)

    def _assign_blame(
        self, design: Design, rate: float, ttft: float, tpot: float, margin: float
    ) -> None:
        """Which pool failed, where that is certain: its promise alone misses by `margin`."""
        if self.evaluator.spare_workers or self.evaluator.rules is Rules.SPLITWISE:
            return
        if design.kind != "disaggregated":
            self.blame.add(design.counts, design.max_step_tokens, rate)
            return
        prefill, decode = design.side(PoolRole.PREFILL), design.side(PoolRole.DECODE)
        bounds = self.space.bound_of(design)
        is_exact = self.evaluator.rules is Rules.DISTSERVE
        # Under our own rules a full decode pool delays the first token too.
        if ttft < margin and (is_exact or bounds.decode_estimate(decode) > 1.3 * rate):
            self.blame.add(prefill, design.max_step_tokens, rate)
        if tpot < margin:
            self.blame.add(decode, design.max_step_tokens, rate)
