"""All designs that a cluster can hold, and the steps from one to the next."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from placement.search.bounds import Bounds
from placement.search.designs import Design, Worker
from placement.search.enumerate import Fleet
from placement.search.links import link_rate
from placement.simulation.values import PoolRole, Rules

MAX_LISTED = 12_000
MAX_MIXED_GPUS = 8
MIN_BATCH = 8
EPSILON = 1e-9
CORNER_SLACK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Workers that can serve at all, the nodes they run on, and bounds by step tokens."""

    fleets: tuple[Fleet, ...]
    workers: tuple[Worker, ...]
    bounds: Mapping[int, Bounds]  # by max_step_tokens
    rules: Rules
    is_mixed_allowed: bool
    mean_prompt_tokens: float = 0.0  # what KV between nodes is reckoned with; 0: no limit

    def of_role(self, role: PoolRole) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.role is role)

    def bound_of(self, design: Design) -> Bounds:
        return self.bounds[design.max_step_tokens]

    def estimate(self, design: Design) -> float:
        return self.bound_of(design).estimate(design)

    def rate_bound(self, design: Design) -> float:
        """What neither its workers nor the links between nodes can exceed."""
        return min(self.bound_of(design).rate_bound(design), self.link_rate(design))

    def link_rate(self, design: Design) -> float:
        return link_rate(design, self.fleets, self.mean_prompt_tokens)

    def max_count(self, worker: Worker) -> int:
        fleet = next(fleet for fleet in self.fleets if fleet.gpu == worker.gpu)
        per_node = fleet.gpus_per_node // worker.tp
        return per_node * fleet.nodes // worker.pp

    def fits(self, design: Design) -> bool:
        """Whether every stage finds a node; first fit by size, exact where sizes divide."""
        for fleet in self.fleets:
            sizes = [
                (worker.tp, count * worker.pp)
                for worker, count in design.counts
                if worker.gpu == fleet.gpu
            ]
            if sizes and not _packs(sizes, fleet.nodes, fleet.gpus_per_node):
                return False
        return True

    def design(self, counts: dict[Worker, int], max_step_tokens: int | None = None) -> Design:
        """With the limits that suit its workers; `max_step_tokens` left out: the best guess."""
        counts = {worker: count for worker, count in counts.items() if count > 0}
        if max_step_tokens is None:
            max_step_tokens = self._best_step_tokens(counts)
        bounds = self.bounds[max_step_tokens]
        places = [bounds.places(w) for w in counts if w.role is not PoolRole.PREFILL]
        return Design.of(
            counts,
            max_step_tokens=max_step_tokens,
            max_num_requests=max([MIN_BATCH, *places]),
        )

    def _best_step_tokens(self, counts: dict[Worker, int]) -> int:
        if len(self.bounds) == 1:
            return next(iter(self.bounds))
        side = tuple((w, n) for w, n in counts.items() if w.role is PoolRole.PREFILL)
        if not side:
            return min(self.bounds)
        return max(
            self.bounds, key=lambda tokens: (self.bounds[tokens].prefill_estimate(side), -tokens)
        )

    @property
    def is_listable(self) -> bool:
        """Whether all designs can be looked at one by one."""
        sizes = {
            role: sum(self.max_count(worker) for worker in self.of_role(role)) for role in PoolRole
        }
        return sizes[PoolRole.PREFILL] * sizes[PoolRole.DECODE] // 2 <= MAX_LISTED

    def listed(self) -> Iterator[Design]:
        """One cut for each role: pairs of pools, colocated pools, and in small clusters both."""
        return (design for design in self._all() if self.fits(design))

    def _all(self) -> Iterator[Design]:
        prefill, decode = self.of_role(PoolRole.PREFILL), self.of_role(PoolRole.DECODE)
        both = self.of_role(PoolRole.COLOCATED)
        for worker in both:
            for tokens in self.bounds:
                for count in range(1, self.max_count(worker) + 1):
                    yield self.design({worker: count}, tokens)
        for reader in prefill:
            for writer in decode:
                for m in range(1, self.max_count(reader) + 1):
                    for n in range(1, self.max_count(writer) + 1):
                        if not self._may_fit(reader, m, writer, n):
                            break
                        yield self.design({reader: m, writer: n})
        if self.is_mixed_allowed and sum(f.num_gpus for f in self.fleets) <= MAX_MIXED_GPUS:
            yield from self._mixed(prefill, decode, both)

    def _mixed(
        self, prefill: tuple[Worker, ...], decode: tuple[Worker, ...], both: tuple[Worker, ...]
    ) -> Iterator[Design]:
        for reader in prefill:
            for writer in decode:
                for worker in both:
                    for m in range(1, self.max_count(reader) + 1):
                        for n in range(1, self.max_count(writer) + 1):
                            if not self._may_fit(reader, m, writer, n):
                                break
                            for k in range(1, self.max_count(worker) + 1):
                                yield self.design({reader: m, writer: n, worker: k})

    def _may_fit(self, reader: Worker, m: int, writer: Worker, n: int) -> bool:
        if reader.gpu != writer.gpu:
            return True
        fleet = next(fleet for fleet in self.fleets if fleet.gpu == reader.gpu)
        return m * reader.num_gpus + n * writer.num_gpus <= fleet.num_gpus

    def cheaper(
        self, design: Design, price: Callable[[Design], float], most: int
    ) -> list[Design] | None:
        """Every design of one kind of pools that costs less than `design`, the cheapest first.

        Of each role and GPU type the most promising cut, and those of `design` itself; pools of
        several GPU types share a role. None where there are more than `most`.
        """
        kinds = self._interesting(design, is_any_kind=True)
        split = [worker for worker in kinds if worker.role is not PoolRole.COLOCATED]
        both = [worker for worker in kinds if worker.role is PoolRole.COLOCATED]
        limit = price(design) * (1 - EPSILON)
        found: list[tuple[float, int, Design]] = []
        for family in (split, both):
            each = [price(self.design({worker: 1})) for worker in family]
            corner = math.prod(limit / cost + 1 for cost in each) / math.factorial(len(each))
            if corner > CORNER_SLACK * most:  # about as many as there are: too many to list
                return None
            for counts in _cheaper_counts(each, limit):  # of no family: one, of nothing
                other = self.design(dict(zip(family, counts, strict=True)))
                if other.is_complete and self.fits(other):
                    found.append((price(other), len(found), other))
                    if len(found) > most:
                        return None
        return [other for _, _, other in sorted(found, key=lambda item: item[:2])]

    def mixtures(self, most: int) -> list[Design]:
        """Every number of every worker, types and kinds mixed, in clusters that hold few of them.

        Where all cuts are more than `most`, the most promising one of each role and GPU type;
        where those are too many, none.
        """
        for workers in (self.workers, tuple(self._promising(next(iter(self.bounds.values()))))):
            found: list[Design] = []
            for design in self._grown(workers, 0, {}):
                found.append(design)
                if len(found) > most:
                    break
            else:
                return [design for design in found if design.is_complete]
        return []

    def _grown(
        self, workers: Sequence[Worker], first: int, counts: dict[Worker, int]
    ) -> Iterator[Design]:
        for index in range(first, len(workers)):
            grown = {**counts, workers[index]: counts.get(workers[index], 0) + 1}
            kinds = {worker.role is PoolRole.COLOCATED for worker in grown}
            design = self.design(grown)
            if self.fits(design) and (self.is_mixed_allowed or len(kinds) == 1):
                yield design
                yield from self._grown(workers, index, grown)

    def neighbours(self, design: Design) -> list[tuple[str, Design]]:
        """One worker more or less of each kind that it has; also beyond the cluster's size."""
        found = []
        for worker, _ in design.counts:
            found.append((f"1 {worker.label} more", design.with_change(worker, 1)))
            found.append((f"1 {worker.label} less", design.with_change(worker, -1)))
        return [(text, other) for text, other in found if other.is_complete]

    def steps(self, design: Design) -> Iterator[Design]:
        """Designs near by: one more, one less, and GPUs of one kind given to another."""
        seen = {design}
        for other in self._steps(design):
            if other not in seen and other.is_complete and self.fits(other):
                seen.add(other)
                yield other

    def _steps(self, design: Design) -> Iterator[Design]:
        counts = dict(design.counts)
        kinds = self._interesting(design)
        for worker in kinds:
            yield self.design({**counts, worker: counts.get(worker, 0) + 1})
        for worker in counts:
            yield self.design({**counts, worker: counts[worker] - 1})
        for source in counts:
            for target in kinds:
                if source == target:
                    continue
                taken = max(1, target.num_gpus // source.num_gpus)
                given = max(1, source.num_gpus // target.num_gpus)
                if taken <= counts[source]:
                    changed = dict(counts)
                    changed[source] -= taken
                    changed[target] = changed.get(target, 0) + given
                    yield self.design(changed)
        for tokens in self.bounds:
            yield self.design(counts, tokens)

    def _interesting(self, design: Design, *, is_any_kind: bool = False) -> list[Worker]:
        """Its own kinds, and of each role and GPU type the most promising for each GPU."""
        kinds = [worker for worker, _ in design.counts]
        bounds = self.bound_of(design)
        is_free = self.is_mixed_allowed or is_any_kind
        is_mixing = is_free or design.kind == "colocated"
        for role in PoolRole:
            if role is PoolRole.COLOCATED and not is_mixing:
                continue
            is_other = role is not PoolRole.COLOCATED and design.kind == "colocated"
            if is_other and not is_free:
                continue
            kinds += [w for w in self._promising(bounds) if w.role is role and w not in kinds]
        return kinds

    def _promising(self, bounds: Bounds) -> list[Worker]:
        """Of each role and GPU type the worker with the highest rate for each GPU."""
        best: dict[tuple[PoolRole, str], tuple[float, Worker]] = {}
        for role in PoolRole:
            for worker in self.of_role(role):
                rate = bounds.single_estimate(worker) / worker.num_gpus
                key = (role, worker.gpu)
                if key not in best or rate > best[key][0]:
                    best[key] = (rate, worker)
        return [worker for _, worker in best.values()]


def _cheaper_counts(each: Sequence[float], limit: float) -> Iterator[tuple[int, ...]]:
    """All counts whose cost, `each` times its count, is below `limit`; (0, 0, ...) too."""
    if not each:
        yield ()
        return
    count = 0
    while count * each[0] < limit:
        for rest in _cheaper_counts(each[1:], limit - count * each[0]):
            yield (count, *rest)
        count += 1


def _packs(sizes: list[tuple[int, int]], nodes: int, gpus_per_node: int) -> bool:
    """First fit, greatest first, over groups of alike nodes: {free GPUs: nodes}."""
    free = {gpus_per_node: nodes}
    for size, count in sorted(sizes, reverse=True):
        left = count
        while left > 0:
            rooms = [room for room, number in free.items() if room >= size and number > 0]
            if not rooms:
                return False
            room = min(rooms)
            each = room // size
            whole = min(free[room], left // each)
            if whole:
                free[room] -= whole
                free[room - each * size] = free.get(room - each * size, 0) + whole
                left -= whole * each
            else:
                free[room] -= 1
                free[room - left * size] = free.get(room - left * size, 0) + 1
                left = 0
    return True
