"""Instances onto nodes, as an integer program over patterns (what one node may hold).

    min   nodes used, then KV bytes/s that cross nodes
    with  every instance placed, nodes of each GPU type within the cluster,
          KV that leaves or enters a node within its links' rate

Nodes are alike, so the program counts nodes by pattern and has no symmetry to fight. A tensor
parallel group lies in one node; an instance larger than a node goes stage by stage.

The KV of a request is read in a prefill instance's node and wanted in a decode instance's; within
a node it does not cross. High affinity (DistServe's word): links carry all KV between any two
nodes, and placement is free. Low affinity: they do not, and each node needs both roles in
proportion; stages of pipelines are then paired (the same-stage rule): stage i of prefill with
stage i of decode, since they hold the KV of the same layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from placement.search.designs import Design, Worker
from placement.search.enumerate import Fleet
from placement.simulation.values import PoolRole

LINK_SHARE = 0.5  # of a node's links that KV may fill on average: transfers come in bursts
MAX_PATTERNS = 4000
CROSS_WEIGHT = 0.5  # of all crossing KV together, in nodes


class Affinity(StrEnum):
    """What the links between nodes allow."""

    ONE_NODE = "one node"
    HIGH = "high: links carry all KV between any nodes"
    LOW = "low: prefill and decode share nodes, stage by stage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What is placed whole: an instance, or one stage of one that is larger than a node."""

    worker: Worker
    stage: int | None
    size: int  # GPUs
    kv_in: float  # bytes/s of KV that it takes over
    kv_out: float  # that it hands over
    count: int

    @property
    def name(self) -> str:
        part = "" if self.stage is None else f" stage {self.stage}"
        return f"{self.worker.label}{part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node and what runs on it."""

    gpu: str
    index: int
    items: tuple[tuple[str, int], ...]
    free_gpus: int

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu,
            "node": self.index,
            "workers": dict(self.items),
            "free_gpus": self.free_gpus,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Where everything runs, and the KV traffic that crosses nodes."""

    nodes: tuple[Node, ...]
    affinity: Affinity
    cross_node_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaceable:
    """No assignment; says why."""

    reason: str


def assign(
    design: Design, fleets: Sequence[Fleet], kv_bytes_per_s: float
) -> Assignment | Unplaceable:
    """Place `design`, which hands over `kv_bytes_per_s` of KV from prefill to decode in all."""
    if not design.roles & {PoolRole.PREFILL}:
        kv_bytes_per_s = 0.0
    whole = _items(design, fleets, kv_bytes_per_s, is_staged=False)
    if len(fleets) == 1 and fleets[0].nodes == 1 and whole is not None:
        return _one_node(whole, fleets[0])
    carried = sum(link_room(fleet) * _nodes_needed(design, fleet) for fleet in fleets)
    # All KV leaves one node and enters another: the prefill nodes' links must carry it.
    is_thick = 2 * kv_bytes_per_s <= carried / 2
    first = Affinity.HIGH if is_thick else Affinity.LOW
    for affinity in (first, Affinity.LOW):
        is_staged = affinity is Affinity.LOW and any(w.pp > 1 for w, _ in design.counts)
        items = _items(design, fleets, kv_bytes_per_s, is_staged=is_staged)
        if items is None:
            return Unplaceable(reason="a tensor parallel group is larger than a node")
        found = _solve(items, fleets, affinity)
        if found is not None:
            return found
    return Unplaceable(
        reason=f"{design.label} does not pack into the nodes with {kv_bytes_per_s / 1e9:.3g} GB/s "
        "of KV under their links"
    )


def link_room(fleet: Fleet) -> float:
    """KV bytes/s, one way, that a node's links may carry on average."""
    return fleet.network_bytes_per_s * fleet.gpus_per_node * LINK_SHARE


def _nodes_needed(design: Design, fleet: Fleet) -> int:
    used = design.gpus_by_type().get(fleet.gpu, 0)
    return -(-used // fleet.gpus_per_node)


def _items(
    design: Design, fleets: Sequence[Fleet], kv_bytes_per_s: float, *, is_staged: bool
) -> list[Item] | None:
    """Placeable pieces with their KV traffic, which splits by GPUs within a role."""
    per_node = {fleet.gpu: fleet.gpus_per_node for fleet in fleets}
    gpus = {
        role: sum(w.num_gpus * n for w, n in design.side(role)) or 1
        for role in (PoolRole.PREFILL, PoolRole.DECODE)
    }
    items = []
    for worker, count in design.counts:
        if worker.tp > per_node[worker.gpu]:
            return None
        stages = range(worker.pp) if is_staged or worker.num_gpus > per_node[worker.gpu] else [None]
        for stage in stages:
            size = worker.num_gpus if stage is None else worker.tp
            reads, writes = worker.role is PoolRole.PREFILL, worker.role is PoolRole.DECODE
            items.append(
                Item(
                    worker=worker,
                    stage=stage,
                    size=size,
                    kv_out=kv_bytes_per_s * size / gpus[PoolRole.PREFILL] if reads else 0.0,
                    kv_in=kv_bytes_per_s * size / gpus[PoolRole.DECODE] if writes else 0.0,
                    count=count,
                )
            )
    return items


def _one_node(items: list[Item], fleet: Fleet) -> Assignment | Unplaceable:
    used = sum(item.size * item.count for item in items)
    if used > fleet.gpus_per_node:
        return Unplaceable(reason=f"{used} GPUs are needed, the node has {fleet.gpus_per_node}")
    node = Node(
        gpu=fleet.gpu,
        index=0,
        items=tuple((item.name, item.count) for item in items),
        free_gpus=fleet.gpus_per_node - used,
    )
    return Assignment(nodes=(node,), affinity=Affinity.ONE_NODE, cross_node_bytes_per_s=0.0)


def _patterns(items: Sequence[Item], gpus_per_node: int) -> list[tuple[int, ...]]:
    """All non-empty ways to fill a node; only full ones where there would be too many."""
    found: list[tuple[int, ...]] = []

    def extend(prefix: tuple[int, ...], free: int) -> None:
        if len(found) > MAX_PATTERNS:
            return
        if len(prefix) == len(items):
            if any(prefix):
                found.append(prefix)
            return
        item = items[len(prefix)]
        for count in range(min(free // item.size, item.count), -1, -1):
            extend((*prefix, count), free - count * item.size)

    extend((), gpus_per_node)
    return found


def _crossing(pattern: Sequence[int], items: Sequence[Item], affinity: Affinity) -> float:
    """KV bytes/s that must leave or enter a node with this pattern, the larger of both.

    Under low affinity stage i is matched with stage i alone.
    """
    balance: dict[int | None, float] = {}
    for count, item in zip(pattern, items, strict=True):
        stage = item.stage if affinity is Affinity.LOW else None
        balance[stage] = balance.get(stage, 0.0) + count * (item.kv_out - item.kv_in)
    out = sum(value for value in balance.values() if value > 0)
    into = -sum(value for value in balance.values() if value < 0)
    return max(out, into)


def _solve(items: list[Item], fleets: Sequence[Fleet], affinity: Affinity) -> Assignment | None:
    from placement.search.program import new_program, solution

    model = new_program()
    total = sum(item.kv_out * item.count for item in items) or 1.0
    variables: list[tuple[Any, Fleet, list[Item], tuple[int, ...], float]] = []
    for fleet in fleets:
        mine = [item for item in items if item.worker.gpu == fleet.gpu]
        for pattern in _patterns(mine, fleet.gpus_per_node) if mine else []:
            crossing = _crossing(pattern, mine, affinity)
            if crossing <= link_room(fleet) * (1 + 1e-9):
                variable = model.addIntegral(lb=0, ub=fleet.nodes)
                variables.append((variable, fleet, mine, pattern, crossing))
    if not variables:
        return None
    for fleet in fleets:
        terms = [v for v, of, _, _, _ in variables if of is fleet]
        if terms:
            model.addConstr(sum(terms) <= fleet.nodes)
    for item in items:
        terms = [
            pattern[mine.index(item)] * v for v, _, mine, pattern, _ in variables if item in mine
        ]
        if not terms:
            return None
        model.addConstr(sum(terms) == item.count)
    model.minimize(
        sum((1 + CROSS_WEIGHT * crossing / total) * v for v, _, _, _, crossing in variables)
    )
    values = solution(model)
    return None if values is None else _read(variables, values, affinity)


def _read(
    variables: list[tuple[Any, Fleet, list[Item], tuple[int, ...], float]],
    values: Sequence[float],
    affinity: Affinity,
) -> Assignment | None:
    nodes: list[Node] = []
    crossing_in_all = 0.0
    indices: dict[str, int] = {}
    for variable, fleet, mine, pattern, crossing in variables:
        for _ in range(round(values[variable.index])):
            placed = [(i.name, n) for i, n in zip(mine, pattern, strict=True) if n]
            used = sum(n * i.size for i, n in zip(mine, pattern, strict=True))
            index = indices.get(fleet.gpu, 0)
            indices[fleet.gpu] = index + 1
            crossing_in_all += crossing
            nodes.append(
                Node(
                    gpu=fleet.gpu,
                    index=index,
                    items=tuple(placed),
                    free_gpus=fleet.gpus_per_node - used,
                )
            )
    if not nodes:
        return None
    # What leaves one node enters another: each byte was counted at both.
    return Assignment(
        nodes=tuple(nodes), affinity=affinity, cross_node_bytes_per_s=crossing_in_all / 2
    )
