"""KV memory: blocks where they should be, readable by others, gone when closed."""

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.ids import BlockId, HandoffId, RequestId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import BlockRun, block_runs
from pdserve.engine.paged_cache import DTYPES
from tests.support.coroutines import finish

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
    assert finish(memory.are_sound([BlockId(block) for block in range(3)])) == [True, False, True]
    del numbers
    memory.close()


def test_what_is_no_number_is_sound() -> None:
    memory = KvMemory(LAYOUT, 1, holds_numbers=False)
    memory.block(BlockId(0))[:] = b"\xff" * LAYOUT.block_bytes
    assert finish(memory.are_sound([BlockId(0)])) == [True]
    memory.close()


@pytest.fixture(params=[0, 1 << 20])
def filled(request: pytest.FixtureRequest) -> Iterator[KvMemory]:
    """Eight blocks of random bytes, all of whose work is done by a thread, or at once."""
    memory = KvMemory(LAYOUT, 8)
    memory.thread_above_bytes = request.param
    memory.bytes[:] = Random(5).randbytes(memory.num_bytes)
    yield memory
    memory.close()


RUNS = (BlockRun(0, 5, 2), BlockRun(3, 1, 1))


async def test_runs_are_copied_in_and_out_and_nothing_else(filled: KvMemory) -> None:
    size, before = LAYOUT.block_bytes, bytes(filled.bytes)
    out = bytearray(4 * size)
    await filled.copy_out(out, RUNS)
    assert out == before[5 * size : 7 * size] + bytes(size) + before[size : 2 * size]
    content = Random(6).randbytes(4 * size)
    await filled.copy_in(bytearray(content), RUNS)
    after = bytearray(before)
    after[5 * size : 7 * size], after[size : 2 * size] = content[: 2 * size], content[3 * size :]
    assert filled.bytes == after
    await filled.copy_in(bytearray(4 * size), RUNS)
    await filled.copy_within(torch.frombuffer(bytearray(content), dtype=torch.uint8), RUNS)
    assert filled.bytes == after


async def test_digests_are_those_of_the_blocks_at_their_places(filled: KvMemory) -> None:
    handoff, block_ids = HandoffId(RequestId("r"), 1, 0), [BlockId(6), BlockId(2)]
    assert await filled.digests(handoff, [7, 9], block_ids) == [
        block_digest(handoff, 7, filled.block(BlockId(6))),
        block_digest(handoff, 9, filled.block(BlockId(2))),
    ]


async def test_the_tensor_is_the_memory_itself(filled: KvMemory) -> None:
    tensor = filled.tensor()
    assert tensor.shape == (8, LAYOUT.block_bytes)
    tensor[3, 7] = 99
    (block,) = filled.host_blocks([BlockId(3)])
    assert block[7] == 99


async def test_large_work_leaves_the_event_loop_free_and_small_work_takes_no_thread(
    filled: KvMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def digest(*args: object) -> bytes:
        threads.append(threading.current_thread() is threading.main_thread())
        return b""

    monkeypatch.setattr("pdserve.engine.kv_memory.block_digest", digest)
    await filled.digests(HandoffId(RequestId("r"), 1, 0), [0], [BlockId(0)])
    assert threads == [filled.thread_above_bytes > 0]


@pytest.mark.parametrize("num_turns", [0, 1, 2, 3])
async def test_a_cancelled_copy_writes_nothing_afterwards(num_turns: int) -> None:
    memory = KvMemory(LAYOUT, 4096)
    memory.thread_above_bytes = 0
    runs = [BlockRun(block, 4095 - block, 1) for block in range(4096)]
    copying = asyncio.create_task(memory.copy_in(bytearray(b"x" * memory.num_bytes), runs))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    copying.cancel()
    await asyncio.wait([copying])
    memory.bytes[:] = bytes(memory.num_bytes)
    await asyncio.to_thread(bool)
    assert memory.bytes == bytes(memory.num_bytes)
    memory.close()


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
