"""KV memory: blocks where they should be, readable by others, gone when closed."""

import os
from dataclasses import replace

import pytest
import torch

from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.paged_cache import DTYPES

LAYOUT = KvLayout(layers=(LayerKv(1, 8, 8),), block_size=4, dtype="float32", item_bytes=4)


def test_blocks_lie_one_after_another_and_start_zeroed() -> None:
    memory = KvMemory(LAYOUT, 3)
    assert bytes(memory.bytes) == bytes(3 * LAYOUT.block_bytes)
    memory.block(BlockId(1))[:] = b"\x07" * LAYOUT.block_bytes
    assert bytes(memory.block(BlockId(0))) == bytes(LAYOUT.block_bytes)
    assert bytes(memory.bytes[LAYOUT.block_bytes : 2 * LAYOUT.block_bytes]) == b"\x07" * (
        LAYOUT.block_bytes
    )
    memory.close()


def test_others_read_what_is_written_and_nobody_can_shrink_it() -> None:
    memory = KvMemory(LAYOUT, 1)
    memory.block(BlockId(0))[:4] = b"word"
    assert memory.fd is not None
    with open(f"/proc/self/fd/{memory.fd}", "rb") as reader:
        assert reader.read(4) == b"word"
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 1)
    memory.close()


def test_close_gives_the_descriptor_back_and_can_be_repeated() -> None:
    before = set(os.listdir("/proc/self/fd"))
    memory = KvMemory(LAYOUT, 1)
    memory.close()
    memory.close()
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_block_with_a_number_that_is_not_finite_is_not_sound(dtype: str, bad: str) -> None:
    layout = replace(LAYOUT, dtype=dtype, item_bytes=DTYPES[dtype].itemsize)
    memory = KvMemory(layout, 3)
    numbers = torch.frombuffer(memory.bytes, dtype=DTYPES[dtype]).view(3, -1)
    numbers[:] = torch.finfo(DTYPES[dtype]).max
    numbers[0, ::2] = torch.finfo(DTYPES[dtype]).smallest_normal
    numbers[1, -1] = float(bad)
    assert [memory.is_sound(BlockId(block)) for block in range(3)] == [True, False, True]
    del numbers
    memory.close()


def test_what_is_no_number_is_sound() -> None:
    memory = KvMemory(LAYOUT, 1, holds_numbers=False)
    memory.block(BlockId(0))[:] = b"\xff" * LAYOUT.block_bytes
    assert memory.is_sound(BlockId(0))
    memory.close()
