"""The search itself: from a problem to the best design, certified, or to what comes nearest."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from placement.search.designs import Design, Worker
from placement.search.evaluate import NO_GOODPUT, Evaluator, Goodput
from placement.search.maximise import Contest
from placement.search.minimise import Bargain
from placement.search.problem import Problem
from placement.search.space import Space
from placement.simulation.values import PoolRole

MAX_CERTIFICATIONS = 6
CALIBRATIONS = 2
DINKELBACH_ROUNDS = 4
MAX_FORMER = 4
CELL_LOAD, MORE_CELLS = 0.8, 1.25  # of its estimate that a cell is given; and where that fails
RATE_MARGINS = (1.0, 1.1, 1.25, 1.45)
COARSE = 0.02
MAX_MIXTURES = 2000
CERTIFY_FACTOR = 1.015
MAX_REQUESTS, MAX_CELL_REQUESTS = 200_000, 9_000  # of a trace; of one of many equal cells
LEAST_HORIZON_S, MOST_REQUESTS = 80.0, 400_000  # the second where the first takes more


@dataclass(slots=True, kw_only=True)
class Choice:
    """The design, its certified goodput where that was searched, and the searches behind it."""

    design: Design | None
    goodput: Goodput
    contest: Contest
    bargain: Bargain | None = None


def new_evaluator(problem: Problem, on_run: Callable[[int], None] | None = None) -> Evaluator:
    return Evaluator(
        traffic=problem.traffic,
        judge=problem.judge,
        base=problem.base,
        horizon_s=_horizon_s(problem),
        num_seeds=problem.inputs.search.seeds,
        on_run=on_run,
    )


def _horizon_s(problem: Problem) -> float:
    """The asked horizon, or less where many requests/s say as much in a shorter one."""
    asked_s = problem.inputs.search.duration_s
    per_gpu = max(
        (
            space.single_estimate(worker) / worker.num_gpus
            for space in problem.space.bounds.values()
            for worker in problem.space.workers
            if worker.role is PoolRole.COLOCATED or not problem.inputs.search.colocated
        ),
        default=0.0,
    )
    rate = problem.rate or 2 * per_gpu * problem.num_gpus
    most = MAX_REQUESTS if problem.num_cells == 1 else MAX_CELL_REQUESTS
    if rate <= 0:
        return asked_s
    return min(asked_s, max(most / rate, min(LEAST_HORIZON_S, MOST_REQUESTS / rate)))


def choose(problem: Problem, evaluator: Evaluator) -> Choice:
    """Search by the problem's objective."""
    return _at_rate(problem, evaluator) if problem.is_at_rate else most_goodput(problem, evaluator)


def few_cells(problem: Problem) -> Iterator[Problem]:
    """The problem with as few of its equal cells as may serve its rate, then with more: each cell
    rounds its workers up, and the rest of the cluster stays free."""
    from placement.search.program import solve_mix

    num = problem.num_cells
    if problem.rate is not None and problem.is_at_rate and num > 1:
        rate, most = problem.rate * num, 0.0
        for tokens in problem.space.bounds:
            rates = _single_rates(problem.space, tokens)
            counts = solve_mix(problem.space.workers, rates, _gpus(problem), price=lambda _: 0.0)
            most = max(most, _program_rate(counts or {}, rates))
        used = math.ceil(rate / (CELL_LOAD * most)) if most > 0 else num
        while used < num:
            yield replace(problem, num_cells=used, rate=rate / used, num_unused_gpus=0)
            used = math.ceil(used * MORE_CELLS)
    yield problem


def most_goodput(
    problem: Problem,
    evaluator: Evaluator,
    *,
    value: Callable[[Design, float], float] | None = None,
    is_certified: bool = True,
) -> Choice:
    """The design with the greatest value, then certified beside its neighbours."""
    value = value or problem.value
    contest = Contest(problem.space, evaluator, value, tolerance=problem.inputs.search.tolerance)
    if problem.space.is_listable:
        contest.run()
    if len(problem.fleets) > 1 or not problem.space.is_listable:
        _consider_programs(problem, contest)
    if len(problem.fleets) > 1:
        contest.consider(problem.space.mixtures(MAX_MIXTURES))
    contest.climb()
    if _challenge_by_other_kind(problem, contest):
        contest.climb()
    if is_certified and contest.best is not None:
        certify(problem.space, contest)
    return Choice(design=contest.best, goodput=contest.best_goodput, contest=contest)


def _challenge_by_other_kind(problem: Problem, contest: Contest) -> bool:
    """Let the best of the other kind, by simulation among its own, challenge; whether it won.

    Estimates of one kind may be off altogether, and then drop what is better.
    """
    if contest.best is None:
        return False
    other = best_of_other_kind(problem, contest.evaluator, contest.value, contest.best)
    if other is None:
        return False
    design, found = other
    if contest.value(design, found.rate) <= contest.best_value * (1 + contest.tolerance):
        return False
    return contest._crown(design, found.rate)


def best_of_other_kind(
    problem: Problem,
    evaluator: Evaluator,
    value: Callable[[Design, float], float],
    design: Design,
) -> tuple[Design, Goodput] | None:
    """The best disaggregated design beside one that colocates, or the best colocated one; of
    several GPU types where there are."""
    space = _of_one_kind(problem.space, is_colocated=design.kind != "colocated")
    contest = Contest(space, evaluator, value, tolerance=COARSE)
    contest.consider(reachable(space))
    if len(problem.fleets) > 1 or not space.is_listable:
        _consider_programs(replace(problem, space=space), contest)
        contest.climb()
    return None if contest.best is None else (contest.best, contest.best_goodput)


def _of_one_kind(space: Space, *, is_colocated: bool) -> Space:
    workers = tuple(w for w in space.workers if (w.role is PoolRole.COLOCATED) == is_colocated)
    return replace(space, workers=workers, is_mixed_allowed=False)


def reachable(space: Space) -> list[Design]:
    """All designs of a small cluster; of a large one, all of it colocated in one cut."""
    if space.is_listable:
        return list(space.listed())
    return [
        space.design({worker: space.max_count(worker)})
        for worker in space.of_role(PoolRole.COLOCATED)
    ]


def certify(space: Space, contest: Contest) -> None:
    """Measure the best over all seeds and the whole horizon; neighbours may still take its place.

    Rates of the search are of shorter traces and fewer seeds, so they only start this.
    """
    evaluator = contest.evaluator
    for _ in range(MAX_CERTIFICATIONS):
        design = contest.best
        assert design is not None
        found = evaluator.goodput(
            design,
            contest.best_goodput.rate,
            num_seeds=evaluator.num_seeds,
            tolerance=contest.tolerance,
            factor=CERTIFY_FACTOR,
        ).at_most(space.link_rate(design))
        contest.best_goodput, contest.best_value = found, contest.value(design, found.rate)
        better = _better_neighbour(space, contest, design)
        if better is None:
            return
        contest.best = better
        contest.tally.trail.append((better, contest.best_value))


def _better_neighbour(space: Space, contest: Contest, design: Design) -> Design | None:
    goal = contest.best_value * (1 + contest.tolerance)
    evaluator = contest.evaluator
    # Those that led before may have been measured badly on few traces.
    others = [other for _, other in space.neighbours(design)]
    if contest.is_small:
        others += [other for other in space.steps(design) if other not in others]
    others += [other for other, _ in contest.tally.trail[-MAX_FORMER:] if other != design]
    for other in others:
        if not space.fits(other):
            continue
        rate = goal / max(contest.value(other, 1.0), 1e-12)
        if space.rate_bound(other) < rate or not contest.reaches(other, rate):
            continue
        is_held = evaluator.holds(other, rate, evaluator.num_seeds)
        if is_held and contest.is_placeable(other, rate):
            contest.best_goodput = replace(contest.best_goodput, rate=rate)
            return other
    return None


def _at_rate(problem: Problem, evaluator: Evaluator) -> Choice:
    """The cheapest design that keeps its promises at the rate, over all seeds and horizons."""
    assert problem.rate is not None
    contest = Contest(
        problem.space, evaluator, problem.value, tolerance=problem.inputs.search.tolerance
    )
    bargain = Bargain(problem.space, contest, problem.price, problem.rate)
    design = cheapest(problem, bargain)
    return Choice(design=design, goodput=NO_GOODPUT, contest=contest, bargain=bargain)


def cheapest(problem: Problem, bargain: Bargain) -> Design | None:
    """Search, certify, and search again without what failed the certificate."""
    evaluator = bargain.contest.evaluator
    for _ in range(MAX_CERTIFICATIONS):
        if len(problem.fleets) > 1:
            _consider_cheap_programs(problem, bargain)
        if problem.space.is_listable or len(problem.fleets) == 1:
            bargain.run()
            _bargain_with_other_kind(problem, bargain)
        bargain.climb()
        bargain.sweep()
        if bargain.best is None:
            return None
        if evaluator.holds(bargain.best, bargain.rate, evaluator.num_seeds):
            return bargain.best
        bargain.refuse(bargain.best)
    return None


def _bargain_with_other_kind(problem: Problem, bargain: Bargain) -> None:
    """The same search among designs of the other kind alone: guesses of one kind may be off."""
    if bargain.best is None:
        return
    space = _of_one_kind(problem.space, is_colocated=bargain.best.kind != "colocated")
    if not space.workers:
        return
    contest = Contest(space, bargain.contest.evaluator, problem.value, tolerance=COARSE)
    other = Bargain(space, contest, problem.price, bargain.rate)
    other.run()
    if other.best is not None:
        bargain.consider([other.best])


def _single_rates(space: Space, tokens: int) -> dict[Worker, float]:
    return {worker: space.bounds[tokens].single_estimate(worker) for worker in space.workers}


def _gpus(problem: Problem) -> dict[str, int]:
    return {fleet.gpu: fleet.num_gpus for fleet in problem.fleets}


def _consider_programs(problem: Problem, contest: Contest) -> None:
    """Designs of the integer program, its rates corrected by what their simulation shows."""
    from placement.search.program import solve_mix

    space, gpus = problem.space, _gpus(problem)
    is_per_gpu = problem.inputs.objective.goal == "goodput_per_gpu"
    for tokens in space.bounds:
        rates = _single_rates(space, tokens)
        for _ in range(1 + CALIBRATIONS):
            counts: dict[Worker, int] | None = None
            worth = 0.0  # requests/s that a GPU must bring: Dinkelbach's parameter
            for _ in range(DINKELBACH_ROUNDS if is_per_gpu else 1):
                price = worth

                def price_of(worker: Worker, price: float = price) -> float:
                    return price * worker.num_gpus

                counts = solve_mix(space.workers, rates, gpus, price=price_of) or counts
                if counts is None:
                    break
                design = space.design(counts, tokens)
                worth = _program_rate(counts, rates) / design.num_gpus
            if counts is None:
                break
            design = space.design(counts, tokens)
            if not space.fits(design) or not design.is_complete:
                break
            contest.tally.listed += 1
            contest.consider([design])
            scale = _calibration(contest, design, _program_rate(counts, rates))
            if scale is None:
                break
            role, factor = scale
            rates = {w: r * (factor if w.role is role else 1.0) for w, r in rates.items()}


def _program_rate(counts: dict[Worker, int], rates: dict[Worker, float]) -> float:
    both = sum(rates[w] * n for w, n in counts.items() if w.role is PoolRole.COLOCATED)
    read = sum(rates[w] * n for w, n in counts.items() if w.role is PoolRole.PREFILL)
    write = sum(rates[w] * n for w, n in counts.items() if w.role is PoolRole.DECODE)
    return both + min(read, write)


def _calibration(
    contest: Contest, design: Design, expected: float
) -> tuple[PoolRole, float] | None:
    """Which role the program overrates, and by how much: from one run at the expected rate."""
    if design.kind == "colocated":
        return None
    evaluator = contest.evaluator
    horizon_s = evaluator.search_horizon_s(expected)
    margin = evaluator.margin(design, expected, 0, horizon_s)
    if margin.all >= 0:
        return None
    role = PoolRole.PREFILL if margin.ttft <= margin.tpot else PoolRole.DECODE
    return role, 0.88


def _consider_cheap_programs(problem: Problem, bargain: Bargain) -> None:
    from placement.search.program import solve_mix

    assert problem.rate is not None
    space, gpus = problem.space, _gpus(problem)
    designs = []
    for tokens in space.bounds:
        rates = _single_rates(space, tokens)
        for margin in RATE_MARGINS:
            counts = solve_mix(
                space.workers,
                rates,
                gpus,
                price=lambda worker: problem.price(Design(counts=((worker, 1),))),
                rate=problem.rate * margin,
            )
            if counts is not None:
                designs.append(space.design(counts, tokens))
    bargain.consider(designs)
