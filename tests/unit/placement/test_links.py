"""KV between nodes in a search: what links carry, and that no plan asks for more."""

import pytest

from placement.assign import link_room
from placement.search.choose import choose, new_evaluator
from placement.search.designs import Design
from placement.search.links import is_placeable, link_rate
from placement.search.problem import Problem, new_problem
from placement.search.results import PlanResult
from placement.simulation.values import PoolRole
from placement.solver import solve
from tests.support.plan_inputs import two_type_inputs


def pair(problem: Problem, reader: str, writer: str, m: int, n: int) -> Design:
    """m prefill and n decode workers, each TP2."""
    chosen = {}
    for role, gpu, count in ((PoolRole.PREFILL, reader, m), (PoolRole.DECODE, writer, n)):
        worker = next(w for w in problem.space.of_role(role) if (w.gpu, w.tp, w.pp) == (gpu, 2, 1))
        chosen[worker] = count
    return problem.space.design(chosen)


def test_pools_of_two_types_send_all_their_kv_through_the_slower_links() -> None:
    problem = new_problem(two_type_inputs())
    design = pair(problem, "h100_sxm", "a100_sxm", 8, 8)
    prompts, _ = problem.traffic.sample()
    per_request = float(prompts.mean()) * 2 * 40 * 5120 * 2  # K and V, layers, width, bytes
    slower = min(2 * link_room(fleet) for fleet in problem.fleets)
    assert problem.space.link_rate(design) == pytest.approx(slower / per_request, rel=1e-6)
    assert problem.space.rate_bound(design) <= problem.space.link_rate(design)


def test_roles_that_share_a_type_need_not_cross() -> None:
    problem = new_problem(two_type_inputs())
    same = pair(problem, "h100_sxm", "h100_sxm", 4, 4)
    assert problem.space.link_rate(same) == float("inf")
    assert link_rate(same, problem.fleets, 1e9) == float("inf")


def test_placement_is_refused_where_links_are_too_thin_and_not_before() -> None:
    problem = new_problem(two_type_inputs())
    evaluator = new_evaluator(problem)
    design = pair(problem, "h100_sxm", "a100_sxm", 8, 8)
    limit = problem.space.link_rate(design)
    assert is_placeable(evaluator, design, problem.fleets, 0.5 * limit)
    assert not is_placeable(evaluator, design, problem.fleets, 1.5 * limit)


@pytest.mark.parametrize("network", [None, 5.0])
def test_plan_is_one_that_links_carry(network: float | None) -> None:
    result = solve(two_type_inputs(network_gb_per_s=network))
    assert isinstance(result, PlanResult)
    room = sum(2 * 8 * (network or 50.0) * 1e9 for _ in range(2))
    assert result.cross_node_bytes_per_s <= room


def test_thin_links_bring_workers_together() -> None:
    thin = new_problem(two_type_inputs(network_gb_per_s=0.5))
    found = choose(thin, new_evaluator(thin)).design
    assert found is not None
    readers = {w.gpu for w, _ in found.side(PoolRole.PREFILL)}
    writers = {w.gpu for w, _ in found.side(PoolRole.DECODE)}
    assert found.kind == "colocated" or readers == writers
