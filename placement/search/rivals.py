"""The designs beside the plan: neighbours, the best of other kinds, one with a spare."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from placement.search.choose import COARSE, best_of_other_kind, reachable
from placement.search.designs import Design, Worker, gpus_text
from placement.search.evaluate import CLEARLY_LOST, Evaluator, Goodput
from placement.search.links import is_placeable
from placement.search.maximise import Contest
from placement.search.minimise import Bargain
from placement.search.problem import Problem
from placement.search.results import PlanResult, Rival, rival_of
from placement.simulation.values import PoolRole

CELL_COARSE = 0.05
EDGE = 0.03
MAX_KINDS = 3
SEEDS = 2
MAX_TRIALS = 3
MAX_RUNNER_UPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rivals:
    """What a chosen design is compared with, at its rate and on the traces that chose it."""

    problem: Problem
    evaluator: Evaluator
    design: Design
    goodput: Goodput  # as certified; of a search at a given rate none
    rate: float

    def neighbours(self) -> list[Rival]:
        """One worker more or less of each kind, measured on the certificate's traces."""
        compare = self._neighbour_at_rate if self.problem.is_at_rate else self._neighbour_goodput
        return [compare(text, other) for text, other in self.problem.space.neighbours(self.design)]

    def _neighbour_at_rate(self, text: str, other: Design) -> Rival:
        problem, evaluator, rate = self.problem, self.evaluator, self.rate
        is_kept = evaluator.holds(other, rate, evaluator.num_seeds)
        is_cheaper = problem.price(other) < problem.price(self.design) and problem.space.fits(other)
        if is_kept:
            share = problem.price(other) / problem.price(self.design) - 1
            why = f"keeps the promises at {share:+.0%} {_noun(problem)}"
        else:
            after = " after a loss" if evaluator.spare_workers else ""
            why = f"misses {evaluator.margin(other, rate, 0).miss}{after}"
        is_better = is_kept and is_cheaper and is_placeable(evaluator, other, problem.fleets, rate)
        goodput = rate if is_kept else 0.0
        return rival_of(other, text, goodput, why, is_better=is_better)

    def _neighbour_goodput(self, text: str, other: Design) -> Rival:
        """Whether it reaches what it would need to be better, on all seeds; and its rough
        goodput."""
        problem, evaluator = self.problem, self.evaluator
        best = problem.value(self.design, self.goodput.rate)
        tolerance = problem.inputs.search.tolerance
        needed = best * (1 + tolerance) / problem.value(other, 1.0)
        fits = problem.space.fits(other)
        is_held = fits and evaluator.holds(other, needed, evaluator.num_seeds)
        is_better = is_held and is_placeable(evaluator, other, problem.fleets, needed)
        guess = self.goodput.rate * other.num_gpus / self.design.num_gpus
        rough = _rough_goodput(evaluator, other, guess, _coarse(problem))
        value = problem.value(other, rough.rate)
        margin = evaluator.margin(other, needed, 0)
        gap = value / best - 1 if best else 0.0
        why = f"{gap:+.1%} of the objective; {margin.binding} gives way first"
        if not fits:
            why += f"; larger than {_whole(problem)}"
        interval = rough.interval
        return rival_of(other, text, rough.rate, why, is_better=is_better, interval=interval)

    def runner_ups(self) -> list[Rival]:
        """The best of the other kind, and the best with other cuts, and why they lost."""
        problem, evaluator, design = self.problem, self.evaluator, self.design
        if problem.is_at_rate:
            return self._runner_ups_at_rate()
        rivals = []
        other_kind = best_of_other_kind(problem, evaluator, problem.value, design)
        if other_kind is not None:
            rivals.append(self._best_of_cuts(*other_kind))
        families: dict[tuple[object, ...], Design] = {}
        for other in sorted(
            (item for item in reachable(problem.space) if item.kind == design.kind),
            key=lambda item: (-problem.value(item, problem.space.estimate(item)), item.key),
        ):
            if _family(other) != _family(design):
                families.setdefault(_family(other), other)
        for other in list(families.values())[: MAX_RUNNER_UPS - len(rivals)]:
            found = _rough_goodput(evaluator, other, problem.space.estimate(other))
            rivals.append(self._best_of_cuts(*_tuned(problem, evaluator, other, found)))
        return sorted(rivals, key=lambda item: -problem.value(item.design, item.goodput))

    def _best_of_cuts(self, other: Design, found: Goodput) -> Rival:
        best = self.problem.value(self.design, self.goodput.rate)
        value = self.problem.value(other, found.rate)
        beyond = max(found.rate, 1e-3) * 1.1
        margin = self.evaluator.margin(other, beyond, 0, self.evaluator.search_horizon_s(beyond))
        cuts = ", ".join(worker.label for worker, _ in other.counts)
        why = f"{value / best - 1:+.0%} of the objective; {margin.binding} gives way first"
        return rival_of(other, f"best of {cuts}", found.rate, why, interval=found.interval)

    def _runner_ups_at_rate(self) -> list[Rival]:
        """The cheapest of the other kind, and of the kind without the plan's cuts."""
        problem, rivals = self.problem, []
        for what, keep in _restrictions(self.design):
            workers = tuple(worker for worker in problem.space.workers if keep(worker))
            space = replace(problem.space, workers=workers, is_mixed_allowed=False)
            contest = Contest(space, self.evaluator, problem.value, tolerance=COARSE)
            bargain = Bargain(space, contest, problem.price, self.rate)
            bargain.run()
            if bargain.best is None:
                continue
            share = problem.price(bargain.best) / problem.price(self.design) - 1
            why = f"{share:+.0%} {_noun(problem)} for the same promise"
            rivals.append(rival_of(bargain.best, what, self.rate, why))
        return sorted(rivals, key=lambda item: problem.price(item.design))

    def one_gpu_more(self, neighbours: Iterable[Rival]) -> str:
        """What the next worker brings, for each of its GPUs."""
        num_gpus = self.design.num_gpus
        more = [item for item in neighbours if item.design.num_gpus > num_gpus]
        if not more:
            return ""
        if self.problem.is_at_rate:
            return self._one_gpu_more_at_rate(more)

        def gain(item: Rival) -> float:
            return (item.goodput - self.goodput.rate) / (item.design.num_gpus - num_gpus)

        best = max(more, key=gain)
        gpus = best.design.num_gpus - num_gpus
        return (
            f"{best.what} ({gpus_text(gpus)}) brings {max(gain(best), 0.0):.2f} requests/s for "
            f"each GPU (the plan has {self.goodput.rate / num_gpus:.2f})"
        )

    def _one_gpu_more_at_rate(self, more: list[Rival]) -> str:
        """How much further than the asked rate the plan goes, and how far with the best worker
        more."""
        problem, evaluator, design = self.problem, self.evaluator, self.design
        coarse = _coarse(problem)
        own = _rough_goodput(evaluator, design, self.rate, coarse).rate
        least = max(own, 1e-3)
        reached = [(_rough_goodput(evaluator, r.design, least, coarse).rate, r) for r in more]

        def gain(item: tuple[float, Rival]) -> float:
            return (item[0] - own) / (item[1].design.num_gpus - design.num_gpus)

        rate, best = max(reached, key=gain)
        cells = problem.num_cells
        usd = (best.usd_per_hour - design.usd_per_hour) * cells
        each = " in each cell" if cells > 1 else ""
        return (
            f"the plan goes up to {own * cells:.3g} requests/s; with {best.what}{each} "
            f"({gpus_text((best.design.num_gpus - design.num_gpus) * cells)}, {usd:+.2f} USD/h) up "
            f"to {max(rate, own) * cells:.3g}"
        )


def _rough_goodput(
    evaluator: Evaluator, design: Design, guess: float, tolerance: float = COARSE
) -> Goodput:
    return evaluator.goodput(
        design,
        guess,
        num_seeds=1,
        tolerance=tolerance,
        horizon_s=evaluator.search_horizon_s(max(guess, 1e-3)),
    )


def _coarse(problem: Problem) -> float:
    return COARSE if problem.num_cells == 1 else CELL_COARSE


def _family(design: Design) -> tuple[object, ...]:
    return tuple(worker.key for worker, _ in design.counts)


def _tuned(
    problem: Problem, evaluator: Evaluator, design: Design, found: Goodput
) -> tuple[Design, Goodput]:
    """A few steps within a family, since estimates only roughly know its best counts."""
    for _ in range(MAX_TRIALS):
        best_value = problem.value(design, found.rate)
        for _, other in problem.space.neighbours(design):
            if not problem.space.fits(other):
                continue
            rate = best_value * (1 + COARSE) / problem.value(other, 1.0)
            horizon_s = evaluator.search_horizon_s(max(rate, 1e-3))
            if rate > 0 and evaluator.margin(other, rate, 0, horizon_s).all >= 0:
                design, found = other, _rough_goodput(evaluator, other, rate)
                break
        else:
            return design, found
    return design, found


def _whole(problem: Problem) -> str:
    return "the cluster" if problem.num_cells == 1 else "its cell"


def _noun(problem: Problem) -> str:
    goal = problem.inputs.objective.goal
    return "GPUs" if goal == "gpus" else goal


def _restrictions(design: Design) -> Iterator[tuple[str, Callable[[Worker], bool]]]:
    """Names and filters of workers for the searches of runner-ups."""
    if design.kind == "colocated":
        yield "cheapest disaggregated", lambda w: w.role is not PoolRole.COLOCATED
    else:
        yield "cheapest colocated", lambda w: w.role is PoolRole.COLOCATED
    for worker, _ in design.counts:
        yield f"cheapest without {worker.label}", _without(worker)


def _without(gone: Worker) -> Callable[[Worker], bool]:
    """The same kind of design with other cuts."""
    is_colocated = gone.role is PoolRole.COLOCATED
    return lambda w: w != gone and (w.role is PoolRole.COLOCATED) == is_colocated


def spare_plan(problem: Problem, evaluator: Evaluator, result: PlanResult) -> Rival | None:
    """The cheapest that holds the same rate after the loss of any one worker.

    None where the cluster holds none. Starts from the plan, since a spare of each kind always
    does where it fits.
    """
    rate = result.prediction.rate
    if not problem.is_at_rate:
        # At the very edge a spare of the other kind alone can cost a promise.
        rate *= 1 - EDGE
    guarded = evaluator.with_traffic(problem.traffic)
    guarded.spare_workers = 1
    candidates = _with_spares(problem, result.design)
    candidates.sort(key=lambda d: (problem.price(d), d.num_gpus, d.key))
    best = next((d for d in candidates if _survives(guarded, d, rate)), None)
    if best is None:
        return None
    fits = problem.space.fits(best)
    extra = best.num_gpus - result.design.num_gpus
    more_usd = best.usd_per_hour - result.design.usd_per_hour
    where = "" if fits else f"; larger than {_whole(problem)}"
    why = f"{extra:+d} {gpus_text(extra).split()[1]}, {more_usd:+.2f} USD/h{where}"
    return rival_of(best, "N+1: holds after any one worker is lost", rate, why)


def _survives(guarded: Evaluator, design: Design, rate: float) -> bool:
    horizon_s = guarded.search_horizon_s(rate)
    if guarded.margin(design, rate, 0, horizon_s).all < CLEARLY_LOST:
        return False
    return guarded.holds(design, rate, min(SEEDS, guarded.num_seeds), horizon_s)


def _with_spares(problem: Problem, design: Design) -> list[Design]:
    """The design itself, with a spare of one kind, of two, of all."""
    kinds = [worker for worker, _ in design.counts]
    masks: Iterable[int] = range(2 ** len(kinds))
    if len(kinds) > MAX_KINDS:
        masks = [0, *(1 << index for index in range(len(kinds))), 2 ** len(kinds) - 1]
    found = []
    for mask in masks:
        changed = design
        for index, worker in enumerate(kinds):
            if mask >> index & 1:
                changed = changed.with_change(worker, 1)
        found.append(changed)
    return found
