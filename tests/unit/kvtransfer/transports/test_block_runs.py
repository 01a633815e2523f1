from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.transports.block_runs import BlockRun, block_runs, check_read
from pdserve.domain.errors import TransferFailed
from pdserve.domain.messages import RemoteRegion
from tests.support.kv_handoff import blocks, kv_memory

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


@given(PAIRS)
def test_runs_say_the_same_as_the_pairs_in_the_same_order(pairs: list[tuple[int, int]]) -> None:
    remote, local = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    spread = [
        (run.remote + place, run.local + place)
        for run in block_runs(remote, local)
        for place in range(run.count)
    ]
    assert spread == pairs


@given(PAIRS)
def test_neighbouring_runs_could_not_have_been_joined(pairs: list[tuple[int, int]]) -> None:
    runs = list(block_runs([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
    for one, two in pairwise(runs):
        assert (two.remote, two.local) != (one.remote + one.count, one.local + one.count)


def test_blocks_in_order_are_one_run() -> None:
    assert list(block_runs(range(5, 9), range(1, 5))) == [BlockRun(5, 1, 4)]


def region_of(num_blocks: int, block_bytes: int) -> RemoteRegion:
    return RemoteRegion(transport="x", address={}, num_blocks=num_blocks, block_bytes=block_bytes)


def test_a_region_of_another_shape_and_blocks_beyond_it_are_the_peers_fault() -> None:
    with kv_memory(4) as memory:
        check_read(region_of(9, 64), blocks(8), memory, blocks(3))
        with pytest.raises(TransferFailed):
            check_read(region_of(9, 128), blocks(8), memory, blocks(3))
        with pytest.raises(TransferFailed):
            check_read(region_of(8, 64), blocks(8), memory, blocks(3))
        with pytest.raises(TransferFailed):
            check_read(region_of(8, 64), blocks(-1), memory, blocks(3))


def test_local_blocks_that_do_not_exist_are_a_bug() -> None:
    with kv_memory(4) as memory:
        for local in (blocks(4), blocks(-1), blocks(1, 2)):
            with pytest.raises(AssertionError):
                check_read(region_of(9, 64), blocks(8), memory, local)
