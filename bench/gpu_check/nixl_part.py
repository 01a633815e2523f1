"""KV read by nixl from one pool into another, on the same device: exact, and how fast.

Both ends are agents of this process. On a GPU the bytes never come to the host.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from random import Random

import torch

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine
from bench.gpu_check.runtimes import opened_runtime
from kvtransfer.transports.nixl import NixlTransport
from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.device.device_kv import DeviceKv
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore

_ROUNDS = 5


def measure(machine: Machine) -> Iterator[Finding]:
    with opened_runtime(machine) as runtime:
        yield from asyncio.run(_measure(machine, runtime))


async def _measure(machine: Machine, runtime: DeviceRuntime) -> list[Finding]:
    findings = []
    for block_bytes in machine.size((64 << 10, 256 << 10, 2 << 20), (16 << 10, 256 << 10)):
        num_blocks = machine.size(1 << 30, 8 << 20) // block_bytes
        async with _pools(machine, runtime, block_bytes, num_blocks) as (source, target):
            findings += await _read(machine, source, target)
    return findings


@contextlib.asynccontextmanager
async def _pools(
    machine: Machine, runtime: DeviceRuntime, block_bytes: int, num_blocks: int
) -> AsyncIterator[tuple[KvStore, KvStore]]:
    """One of random bytes and an empty one, where a worker of this device has its KV."""
    layer = LayerKv(num_kv_heads=1, k_head_dim=block_bytes // 64, v_head_dim=block_bytes // 64)
    layout = KvLayout(layers=(layer,), block_size=16, dtype="float16", item_bytes=2)
    pools: list[KvStore] = [
        DeviceKv(layout, num_blocks, runtime) if machine.is_gpu else KvMemory(layout, num_blocks)
        for _ in range(2)
    ]
    try:
        pools[0].tensor().random_(0, 256)
        machine.synchronize()
        yield pools[0], pools[1]
    finally:
        for pool in pools:
            pool.close()


async def _read(machine: Machine, source: KvStore, target: KvStore) -> list[Finding]:
    """Half of the blocks, to other places; one read is given up in between."""
    rng, size = Random(5), source.layout.block_bytes
    places = [BlockId(place) for place in range(source.num_blocks)]
    count = len(places) // 2
    remote, local = rng.sample(places, count), rng.sample(places, count)

    async def anyone(block_ids: Sequence[BlockId]) -> bool:
        return True

    async with contextlib.AsyncExitStack() as stack:
        transport = NixlTransport(idle_timeout_s=10.0, total_timeout_s=60.0)
        stack.push_async_callback(transport.close)
        server = await transport.serve(source, anyone)
        stack.push_async_callback(server.close)
        began_s = time.perf_counter()
        await transport.read(server.region, remote[:1], target, local[:1])
        first_s = time.perf_counter() - began_s
        times = []
        for _ in range(_ROUNDS):
            began_s = time.perf_counter()
            await transport.read(server.region, remote, target, local)
            times.append(time.perf_counter() - began_s)
        is_exact = _same(source, remote, target, local)
        given_up = asyncio.create_task(transport.read(server.region, remote, target, local))
        for _ in range(3):
            await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        target.tensor().zero_()
        machine.synchronize()
        await transport.read(server.region, remote[:1], target, local[:1])
        others = [place for place in places if place != local[0]]
        is_untouched = not bool(target.tensor()[others].any())
    what = f"blocks of {size >> 10} KiB"
    return [
        must(f"nixl reads exactly, {what}", is_exact),
        must(f"a read that was given up writes nothing any more, {what}", is_untouched),
        Finding(what=f"first read by nixl, {what}", value=1e3 * first_s, unit="ms"),
        Finding(what=f"read by nixl, {what}", value=count * size / min(times) / 2**30,
                unit="GiB/s", note=f"best of {_ROUNDS}"),
    ]  # fmt: skip


def _same(
    source: KvStore, remote: Sequence[BlockId], target: KvStore, local: Sequence[BlockId]
) -> bool:
    return torch.equal(source.tensor()[list(remote)], target.tensor()[list(local)])
