"""Gloo groups of ranks that are threads: sums, joins, hand-overs, and their deadline."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from pdserve.domain.errors import RankLost
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.ranks.torch_group import TorchGroup, reach_store, serve_store
from pdserve.engine.sharding.thread_group import run_ranks as run_threads

T = TypeVar("T")
LOOPBACK = "127.0.0.1"
DEADLINE_S = 30.0


def run_ranks(
    tp: int, pp: int, work: Callable[[TorchGroup], T], deadline_s: float = DEADLINE_S
) -> list[T]:
    """What `work` returns for each rank, all at the same time."""
    store = serve_store(LOOPBACK, tp * pp, DEADLINE_S)

    def run(rank: int) -> T:
        place = RankPlace(rank=rank, tp=tp, pp=pp)
        group = TorchGroup(
            place,
            reach_store(LOOPBACK, store.port, tp * pp, DEADLINE_S),
            host=LOOPBACK,
            device=torch.device("cpu"),
            deadline_s=deadline_s,
        )
        try:
            return work(group)
        finally:
            group.close()

    with ThreadPoolExecutor(tp * pp) as threads:
        return list(threads.map(run, range(tp * pp)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (2, 2)])
def test_all_reduce_sums_a_stage_and_gives_each_rank_the_same_bits(
    tp: int, pp: int, dtype: torch.dtype
) -> None:
    def parts(stage: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(stage)
        return [torch.randn(5, 7, generator=generator).to(dtype) for _ in range(tp)]

    def work(group: TorchGroup) -> torch.Tensor:
        return group.all_reduce(parts(group.place.stage)[group.place.shard].t())

    sums = run_ranks(tp, pp, work)
    for rank, each in enumerate(sums):
        stage = rank // tp
        assert torch.equal(each, sums[stage * tp])
        expected = torch.stack(parts(stage)).float().sum(0).t()
        torch.testing.assert_close(each.float(), expected, atol=0.05, rtol=0.02)


def test_all_gather_joins_the_last_dimension_in_rank_order() -> None:
    def work(group: TorchGroup) -> torch.Tensor:
        return group.all_gather(torch.full((2, 3), float(group.place.rank)))

    joined = run_ranks(2, 2, work)
    assert joined[0].tolist() == joined[1].tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert joined[2].tolist() == joined[3].tolist() == [[2, 2, 2, 3, 3, 3]] * 2


def test_hand_over_goes_to_the_same_shard_of_the_next_stage() -> None:
    def work(group: TorchGroup) -> float:
        if group.place.is_first_stage:
            group.send(torch.full((4,), float(group.place.rank)).bfloat16())
            return -1.0
        return float(group.receive(torch.empty(4, dtype=torch.bfloat16))[2])

    assert run_ranks(2, 2, work) == [-1.0, -1.0, 0.0, 1.0]


def test_rank_of_a_stage_alone_needs_nobody() -> None:
    [same] = run_ranks(1, 1, lambda group: group.all_gather(group.all_reduce(torch.ones(2))))
    assert same.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "receive"])
def test_operation_without_the_others_ends_at_its_deadline(operation: str) -> None:
    def work(group: TorchGroup) -> float:
        if group.place.rank != (1 if operation == "receive" else 0):
            time.sleep(1.5)  # there, and silent, as a rank that was stopped
            return 0.0
        began_s = time.monotonic()
        with pytest.raises(RankLost, match=rf"lost another one in {operation}"):
            getattr(group, operation)(torch.ones(3))
        with pytest.raises(RankLost, match="closed, or has lost one"):
            getattr(group, operation)(torch.ones(3))
        return time.monotonic() - began_s

    tp, pp = (1, 2) if operation == "receive" else (2, 1)
    assert max(run_ranks(tp, pp, work, deadline_s=0.5)) < 1.5


def test_group_without_the_others_is_not_made() -> None:
    store = serve_store(LOOPBACK, 2, DEADLINE_S)
    with pytest.raises(RankLost, match="did not come together"):
        TorchGroup(
            RankPlace(rank=0, tp=2),
            reach_store(LOOPBACK, store.port, 2, 0.5),
            host=LOOPBACK,
            device=torch.device("cpu"),
            deadline_s=0.5,
        )


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_the_least_is_that_of_all_ranks(tp: int, pp: int) -> None:
    for fullest in range(tp * pp):
        numbers = [7 if rank == fullest else 2**40 + rank for rank in range(tp * pp)]

        def least(group: RankGroup, numbers: list[int] = numbers) -> int:
            return group.least(numbers[group.place.rank], torch.device("cpu"))

        assert set(run_ranks(tp, pp, least)) == {7}
        assert set(run_threads(tp, pp, least)) == {7}
