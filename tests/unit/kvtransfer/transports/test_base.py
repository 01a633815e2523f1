import pytest

from kvtransfer.transports.base import check_read
from pdserve.domain.errors import TransferFailed
from pdserve.domain.messages import RemoteRegion
from tests.support.kv_handoff import blocks, kv_memory


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
