"""KV memory on a simulated device whose streams run late: what the host gets is what lies there."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from random import Random

import pytest
import torch

from pdserve.domain.ids import BlockId, HandoffId, RequestId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.device import device_kv
from pdserve.engine.device.device_kv import DeviceKv
from pdserve.engine.device.runtime import HOST, DeviceRuntime
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_store import BlockRun, block_runs
from pdserve.engine.paged_cache import DTYPES
from tests.support.sim_device import SIM, SimRuntime

LAYOUT = KvLayout(layers=(LayerKv(1, 8, 8),), block_size=4, dtype="float32", item_bytes=4)
ODD = KvLayout(layers=(LayerKv(1, 3, 4),), block_size=3, dtype="float16", item_bytes=2)
NUM_BLOCKS = 12
HANDOFF = HandoffId(RequestId("r"), 3, 1)


@pytest.fixture(params=["host", "device", "late device"])
def runtime(request: pytest.FixtureRequest) -> Iterator[DeviceRuntime]:
    if request.param == "host":
        yield HOST
        return
    with SimRuntime(late=request.param == "late device") as simulated:
        yield simulated


@pytest.fixture(params=[LAYOUT, ODD], ids=["even", "odd"])
async def filled(
    request: pytest.FixtureRequest, runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[DeviceKv, bytes]]:
    """Memory of random bytes, and these; staging has room for two blocks and a half."""
    layout = request.param
    monkeypatch.setattr(device_kv, "STAGING_BYTES", 5 * layout.block_bytes // 2)
    memory = DeviceKv(layout, NUM_BLOCKS, runtime)
    content = Random(5).randbytes(memory.num_bytes)
    await memory.copy_in(bytearray(content), [BlockRun(0, 0, NUM_BLOCKS)])
    yield memory, content
    memory.close()
    memory.close()


async def test_blocks_start_zeroed(runtime: DeviceRuntime) -> None:
    memory = DeviceKv(LAYOUT, 3, runtime)
    target = bytearray(b"\xff" * memory.num_bytes)
    await memory.copy_out(target, [BlockRun(0, 0, 3)])
    assert target == bytes(memory.num_bytes)
    memory.close()


async def test_copies_within_the_device_move_the_blocks_that_they_name(
    filled: tuple[DeviceKv, bytes], runtime: DeviceRuntime
) -> None:
    memory, content = filled
    size, given = memory.layout.block_bytes, Random(6).randbytes(memory.num_bytes)
    other = DeviceKv(memory.layout, NUM_BLOCKS, runtime)
    await other.copy_in(bytearray(given), [BlockRun(0, 0, NUM_BLOCKS)])
    await memory.copy_within(other.tensor().view(-1), [BlockRun(2, 5, 4), BlockRun(0, 1, 1)])
    target = bytearray(memory.num_bytes)
    await memory.copy_out(target, [BlockRun(0, 0, NUM_BLOCKS)])
    expected = bytearray(content)
    expected[5 * size : 9 * size] = given[2 * size : 6 * size]
    expected[size : 2 * size] = given[:size]
    assert target == expected
    other.close()


async def test_copies_move_the_blocks_that_they_name(filled: tuple[DeviceKv, bytes]) -> None:
    memory, content = filled
    size = memory.layout.block_bytes
    given = Random(6).randbytes(NUM_BLOCKS * size)
    chooser = Random(7)
    remote, local = (chooser.sample(range(NUM_BLOCKS), 9) for _ in range(2))
    runs = [*block_runs(remote, local)]
    expected = [content[block * size : (block + 1) * size] for block in range(NUM_BLOCKS)]
    for one, other in zip(remote, local, strict=True):
        expected[other] = given[one * size : (one + 1) * size]
    await memory.copy_in(bytearray(given), runs)
    target = bytearray(NUM_BLOCKS * size)
    places = chooser.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    await memory.copy_out(target, [*block_runs(places, range(NUM_BLOCKS))])
    got = [target[place * size : (place + 1) * size] for place in places]
    assert got == expected


async def test_digests_are_those_of_the_host(filled: tuple[DeviceKv, bytes]) -> None:
    memory, content = filled
    size = memory.layout.block_bytes
    blocks = [BlockId(block) for block in (7, 0, 11, 7)]
    places = [4, 0, 2**40, 5]
    expected = [
        block_digest(HANDOFF, place, memoryview(content[block * size : (block + 1) * size]))
        for place, block in zip(places, blocks, strict=True)
    ]
    assert await memory.digests(HANDOFF, places, blocks) == expected


async def test_more_blocks_than_fit_at_once_have_the_same_digests(
    filled: tuple[DeviceKv, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, _ = filled
    blocks = [BlockId(block) for block in range(NUM_BLOCKS)]
    expected = await memory.digests(HANDOFF, range(NUM_BLOCKS), blocks)
    monkeypatch.setattr(device_kv, "MAX_AT_ONCE", 5)
    assert await memory.digests(HANDOFF, range(NUM_BLOCKS), blocks) == expected
    assert len(set(expected)) == NUM_BLOCKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
async def test_a_block_with_a_number_that_is_not_finite_is_not_sound(
    dtype: str, bad: str, runtime: DeviceRuntime
) -> None:
    kind = DTYPES[dtype]
    memory = DeviceKv(replace(LAYOUT, dtype=dtype, item_bytes=kind.itemsize), 3, runtime)
    numbers = torch.full((3, memory.layout.block_bytes // kind.itemsize), torch.finfo(kind).max)
    numbers = numbers.to(kind)
    numbers[1, -1] = float(bad)
    content = bytearray(numbers.view(torch.uint8).numpy().tobytes())
    await memory.copy_in(content, [BlockRun(0, 0, 3)])
    assert await memory.are_sound([BlockId(block) for block in (2, 1, 0)]) == [True, False, True]
    memory.close()


async def test_the_host_waits_for_events_alone(filled: tuple[DeviceKv, bytes]) -> None:
    memory, _ = filled
    before = SIM.num_waits
    await memory.digests(HANDOFF, [0, 1], [BlockId(0), BlockId(1)])
    await memory.are_sound([BlockId(0)])
    assert SIM.num_waits == before


async def test_a_cancelled_copy_writes_nothing_afterwards(runtime: DeviceRuntime) -> None:
    memory = DeviceKv(LAYOUT, 512, runtime)
    runs = [BlockRun(block, 511 - block, 1) for block in range(512)]
    copying = asyncio.create_task(memory.copy_in(bytearray(b"x" * memory.num_bytes), runs))
    await asyncio.sleep(0)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    before, after = bytearray(memory.num_bytes), bytearray(memory.num_bytes)
    await memory.copy_out(before, [BlockRun(0, 0, 512)])
    await asyncio.to_thread(bool)
    await memory.copy_out(after, [BlockRun(0, 0, 512)])
    assert before == after
    memory.close()
