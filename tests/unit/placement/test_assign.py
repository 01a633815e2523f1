"""Instances onto nodes."""

from placement.assign import Affinity, Assignment, Unplaceable, assign
from placement.search.designs import Design, Worker
from placement.search.enumerate import Fleet
from placement.simulation.timing import DistserveTiming
from placement.simulation.values import Pool, PoolRole

TIMING = DistserveTiming(
    prefill=(1.0, 1.0, 1.0),
    decode_small=(1.0, 1.0, 1.0),
    decode_large=(1.0, 1.0, 1.0),
    threshold=95,
    max_num_tokens=1000,
)


def worker(role: PoolRole, tp: int, pp: int = 1, gpu: str = "a") -> Worker:
    pool = Pool(role=role, replicas=1, timing=TIMING, tp=tp, pp=pp, gpu=gpu)
    return Worker(
        role=role,
        gpu=gpu,
        tp=tp,
        pp=pp,
        ep=1,
        pool=pool,
        usd_per_hour=1.0,
        watts=1.0,
        source="",
        relative_error=0.0,
    )


def fleet(nodes: int, gpus: int = 8, network: float = 25e9) -> Fleet:
    return Fleet(
        gpu="a",
        nodes=nodes,
        gpus_per_node=gpus,
        usd_per_hour=1.0,
        watts=1.0,
        node_bytes_per_s=200e9,
        network_bytes_per_s=network,
    )


P2, D1, D4 = worker(PoolRole.PREFILL, 2), worker(PoolRole.DECODE, 1), worker(PoolRole.DECODE, 4)


def placed(design: Design, nodes: Fleet, kv: float) -> Assignment:
    found = assign(design, [nodes], kv)
    assert isinstance(found, Assignment), found
    return found


def count(found: Assignment, label: str) -> int:
    return sum(n for node in found.nodes for name, n in node.items if name.startswith(label))


def test_every_instance_is_placed_once_and_no_node_is_overfull() -> None:
    design = Design.of({P2: 7, D4: 4})
    found = placed(design, fleet(5), 1e9)
    assert count(found, P2.label) == 7
    assert count(found, D4.label) == 4
    assert all(node.free_gpus >= 0 for node in found.nodes)
    assert len(found.nodes) == 4


def test_thick_links_give_high_affinity_thin_ones_mix_the_roles() -> None:
    design = Design.of({P2: 8, D1: 16})
    assert placed(design, fleet(4), 10e9).affinity is Affinity.HIGH
    low = placed(design, fleet(4, network=0.2e9), 10e9)
    assert low.affinity is Affinity.LOW
    assert low.cross_node_bytes_per_s < 1.0
    for node in low.nodes:
        assert len(node.items) == 2


def test_pipelines_over_thin_links_pair_their_stages() -> None:
    prefill = worker(PoolRole.PREFILL, 4, 2)
    decode = worker(PoolRole.DECODE, 4, 2)
    found = placed(Design.of({prefill: 2, decode: 2}), fleet(4, network=0.2e9), 10e9)
    for node in found.nodes:
        stages = {name.rsplit(" ", 1)[1] for name, _ in node.items}
        assert len(stages) == 1, node


def test_instance_larger_than_a_node_goes_stage_by_stage() -> None:
    deep = worker(PoolRole.COLOCATED, 8, 2)
    found = placed(Design.of({deep: 1}), fleet(2), 0.0)
    assert [node.items for node in found.nodes] == [
        ((f"{deep.label} stage {stage}", 1),) for stage in (0, 1)
    ] or len(found.nodes) == 2


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    too_many = assign(Design.of({P2: 9}), [fleet(2)], 0.0)
    assert isinstance(too_many, Unplaceable)
    too_wide = assign(Design.of({worker(PoolRole.COLOCATED, 16): 1}), [fleet(2)], 0.0)
    assert isinstance(too_wide, Unplaceable)
    assert "larger than a node" in too_wide.reason


def test_same_question_gets_the_same_nodes() -> None:
    design = Design.of({P2: 6, D1: 9, D4: 2})
    assert placed(design, fleet(6), 5e9) == placed(design, fleet(6), 5e9)
