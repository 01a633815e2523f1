"""Which Ray node each worker goes to: a pure decision over what the nodes have free.

Workers that the plan puts on one node stay on one node where they fit; plan nodes go to Ray nodes
of their own where there are enough. Amounts are Ray's: resource name to a number, in steps of
1/10000.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

UNITS = 10_000

Amounts = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A node that lives, as Ray tells of it."""

    node_id: str
    host: str
    port: int  # of its raylet, which answers as long as the node lives
    free: Amounts
    total: Amounts

    @property
    def label(self) -> str:
        """For people; test clusters have several nodes at one address."""
        return f"{self.host} ({self.node_id[:6]})"

    def emptied(self) -> "RayNode":
        """The node as if nothing ran on it."""
        return replace(self, free=self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a worker, or a router, asks of its node: a bundle for each rank, all on one node."""

    name: str
    bundle: Amounts
    num_ranks: int = 1
    group: str = ""  # the plan's node; empty: it stands alone

    @property
    def amounts(self) -> Amounts:
        return {name: amount * self.num_ranks for name, amount in self.bundle.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    nodes: Mapping[str, str]  # name of a need to node id
    notes: tuple[str, ...] = ()  # where it is not as the plan has it, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """No placement: what would fit, and what is missing."""

    placed: tuple[str, ...]
    missing: tuple[Need, ...]


@dataclass(slots=True)
class _Room:
    """Free amounts of one node while workers are put there, in whole units."""

    node_id: str
    free: dict[str, int]
    groups: set[str] = field(default_factory=set)

    def fits(self, wanted: Mapping[str, int]) -> bool:
        return all(self.free.get(name, 0) >= amount for name, amount in wanted.items())

    def take(self, wanted: Mapping[str, int], group: str) -> None:
        for name, amount in wanted.items():
            self.free[name] -= amount
        self.groups.add(group)


def place(
    needs: Sequence[Need], nodes: Sequence[RayNode], *, prefer: Sequence[str] = ()
) -> Placement | Unfit:
    """Put every need on a node; same arguments, same answer.

    First whole plan nodes, the largest first; if these do not all fit, worker by worker, the
    largest first. Between nodes that fit, those of `prefer` win in their order, then a node that no
    other plan node has, then the freest. With amounts that divide each other (1, 2, 4, 8 GPUs),
    worker by worker finds a placement wherever there is one.
    """
    grouped = _groups(needs)
    found = _fill(grouped, nodes, prefer)
    if isinstance(found, Placement):
        return found
    single = _fill([[need] for need in needs], nodes, prefer)
    if isinstance(single, Unfit):
        return single
    return Placement(nodes=single.nodes, notes=tuple(_torn(grouped, single.nodes)))


def _groups(needs: Sequence[Need]) -> list[list[Need]]:
    """Needs of one plan node together, others alone."""
    groups: dict[str, list[Need]] = {}
    for need in needs:
        groups.setdefault(need.group or f" {need.name}", []).append(need)
    return list(groups.values())


def _fill(
    groups: Iterable[Sequence[Need]], nodes: Sequence[RayNode], prefer: Sequence[str]
) -> Placement | Unfit:
    rooms = [_Room(node.node_id, _units(node.free)) for node in nodes]
    chosen: dict[str, str] = {}
    missing: list[Need] = []
    # sorted() is stable: groups of one size stay in the order they came in.
    for group in sorted(groups, key=lambda group: -sum(_wanted(group).values())):
        wanted = _wanted(group)
        fitting = [room for room in rooms if room.fits(wanted)]
        if not fitting:
            missing += group
            continue
        room = min(fitting, key=lambda room: _rank(room, group[0], wanted, prefer))
        room.take(wanted, group[0].group)
        chosen |= {need.name: room.node_id for need in group}
    if missing:
        return Unfit(placed=tuple(chosen), missing=tuple(missing))
    return Placement(nodes=chosen)


def _wanted(group: Sequence[Need]) -> dict[str, int]:
    """All of a group together, in units."""
    units: dict[str, int] = {}
    for need in group:
        for name, amount in _units(need.amounts).items():
            units[name] = units.get(name, 0) + amount
    return units


def _rank(
    room: _Room, need: Need, wanted: Mapping[str, int], prefer: Sequence[str]
) -> tuple[int, bool, int, str]:
    """Smallest wins."""
    place_in_prefer = prefer.index(room.node_id) if room.node_id in prefer else len(prefer)
    has_others = bool(need.group) and bool(room.groups - {need.group, ""})
    left = min((room.free[name] - amount for name, amount in wanted.items()), default=0)
    return place_in_prefer, has_others, -left, room.node_id


def _torn(groups: Iterable[Sequence[Need]], nodes: Mapping[str, str]) -> Iterable[str]:
    for group in groups:
        num_nodes = len({nodes[need.name] for need in group})
        if num_nodes > 1:
            names = ", ".join(need.name for need in group)
            yield (
                f"no node has room for all of {group[0].group} of the plan: {names} run on "
                f"{num_nodes} nodes, and KV between them crosses the network"
            )


def _units(amounts: Amounts) -> dict[str, int]:
    return {name: round(amount * UNITS) for name, amount in amounts.items()}
