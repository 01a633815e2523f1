"""Where workers go on Ray nodes."""

from collections import Counter
from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.placing import Need, Placement, RayNode, Unfit, place


def node(name: str, **free: float) -> RayNode:
    return RayNode(node_id=name, host="10.0.0.1", port=1, free=free, total=free)


def gpu_need(name: str, num_ranks: int = 1, group: str = "") -> Need:
    return Need(name=name, bundle={"GPU": 1, "CPU": 0.5}, num_ranks=num_ranks, group=group)


def placed(found: Placement | Unfit) -> Mapping[str, str]:
    assert isinstance(found, Placement), found
    return found.nodes


def test_workers_of_one_plan_node_share_a_node_and_plan_nodes_have_their_own() -> None:
    needs = [
        gpu_need("prefill-0", group="h100:0"),
        gpu_need("decode-0", group="h100:0"),
        gpu_need("prefill-1", group="h100:1"),
        gpu_need("decode-1", group="h100:1"),
    ]
    nodes = placed(place(needs, [node("a", GPU=8, CPU=8), node("b", GPU=8, CPU=8)]))
    assert nodes["prefill-0"] == nodes["decode-0"] != nodes["prefill-1"] == nodes["decode-1"]


def test_plan_nodes_share_a_node_where_there_are_not_enough() -> None:
    needs = [gpu_need("prefill-0", group="h100:0"), gpu_need("decode-0", group="h100:1")]
    found = place(needs, [node("a", GPU=8, CPU=8), node("b", CPU=8)])
    assert placed(found) == {"prefill-0": "a", "decode-0": "a"}


def test_plan_node_that_fits_nowhere_is_torn_and_that_is_told() -> None:
    needs = [gpu_need(f"decode-{i}", num_ranks=2, group="h100:0") for i in range(3)]
    found = place(needs, [node("a", GPU=4, CPU=8), node("b", GPU=4, CPU=8)])
    assert Counter(placed(found).values()) in ({"a": 2, "b": 1}, {"a": 1, "b": 2})
    assert isinstance(found, Placement)
    (note,) = found.notes
    assert "h100:0" in note
    assert "decode-0, decode-1, decode-2 run on 2 nodes" in note


def test_ranks_of_a_worker_never_span_nodes() -> None:
    found = place([gpu_need("decode-0", num_ranks=8)], [node("a", GPU=4, CPU=8)] * 2)
    assert isinstance(found, Unfit)
    assert [need.name for need in found.missing] == ["decode-0"]


def test_what_would_fit_is_told() -> None:
    needs = [gpu_need("prefill-0"), gpu_need("decode-0"), gpu_need("decode-1")]
    found = place(needs, [node("a", GPU=2, CPU=8)])
    assert isinstance(found, Unfit)
    assert found.placed == ("prefill-0", "decode-0")
    assert [need.name for need in found.missing] == ["decode-1"]


def test_workers_without_a_plan_node_spread() -> None:
    needs = [Need(name=f"{role}-{i}", bundle={"CPU": 1}) for role in "pd" for i in range(2)]
    nodes = placed(place(needs, [node("a", CPU=4), node("b", CPU=4)]))
    assert nodes["p-0"] != nodes["p-1"]
    assert nodes["d-0"] != nodes["d-1"]


def test_preferred_node_wins_while_it_has_room() -> None:
    nodes = [node("a", GPU=8, CPU=8), node("b", GPU=1, CPU=1)]
    assert placed(place([gpu_need("decode-0")], nodes, prefer=["b", "a"])) == {"decode-0": "b"}
    found = place([gpu_need("decode-0", num_ranks=2)], nodes, prefer=["b", "a"])
    assert placed(found) == {"decode-0": "a"}


def test_fractions_add_up_as_ray_adds_them() -> None:
    needs = [Need(name=f"decode-{i}", bundle={"CPU": 0.1}) for i in range(10)]
    assert isinstance(place(needs, [node("a", CPU=1)]), Placement)
    assert isinstance(
        place([*needs, Need(name="one", bundle={"CPU": 0.1})], [node("a", CPU=1)]), Unfit
    )


@given(
    ranks=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_finds_a_placement_of_powers_of_two_wherever_there_is_one(
    ranks: list[int], sizes: list[int]
) -> None:
    """Against every way to place them."""
    needs = [gpu_need(f"w{i}", num_ranks=count) for i, count in enumerate(ranks)]
    nodes = [node(f"n{i}", GPU=size, CPU=100) for i, size in enumerate(sizes)]

    def fits(choice: tuple[int, ...]) -> bool:
        used = Counter[int]()
        for chosen, count in zip(choice, ranks, strict=True):
            used[chosen] += count
        return all(used[i] <= size for i, size in enumerate(sizes))

    is_possible = any(map(fits, product(range(len(sizes)), repeat=len(ranks))))
    found = place(needs, nodes)
    assert isinstance(found, Placement) == is_possible
    if isinstance(found, Placement):
        assert fits(tuple(int(found.nodes[need.name][1:]) for need in needs))


@pytest.mark.parametrize("order", [1, -1])
def test_same_question_same_answer(order: int) -> None:
    nodes = [node("a", GPU=4, CPU=8), node("b", GPU=4, CPU=8)][::order]
    assert placed(place([gpu_need("decode-0")], nodes)) == {"decode-0": "a"}
