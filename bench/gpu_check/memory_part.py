"""Draws, digests and copies of blocks: the same as the host's, and how fast."""

import asyncio
import time
from collections.abc import Awaitable, Iterator

import numpy as np
import torch

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine
from bench.gpu_check.runtimes import opened_runtime
from pdserve.domain.ids import BlockId, HandoffId, RequestId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import SampleStep
from pdserve.engine.device.device_draws import DrawPlan, draw, greedy_tokens
from pdserve.engine.device.device_kv import DeviceKv
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_store import BlockRun
from pdserve.engine.sampling import draw_tokens

_SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top-k 50, top-p 0.9": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
    "top-p 0.95": SamplingParams(temperature=1.1, top_p=0.95),
}


def measure(machine: Machine) -> Iterator[Finding]:
    with opened_runtime(machine) as runtime:
        for name, params in _SAMPLINGS.items():
            yield from _draws(machine, runtime, name, params)
        yield from _blocks(machine, runtime)


@torch.inference_mode()
def _draws(
    machine: Machine, runtime: DeviceRuntime, name: str, params: SamplingParams
) -> list[Finding]:
    rows, vocabulary = machine.size((256, 128_256), (16, 1000))
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    steps = [SampleStep(params=params, token_index=place) for place in range(rows)]
    drawn = draw_tokens(logits.numpy(), steps, ())
    wanted = [each.token_id for each in drawn if isinstance(each, SampledToken)]
    plan = DrawPlan.of(steps, vocabulary)
    there = logits.to(runtime.device)
    plain, cut = (
        torch.from_numpy(part.copy()).to(runtime.device) for part in (plan.plain, plan.cut)
    )

    def draw_there() -> torch.Tensor:
        return draw(there, greedy_tokens(there), plain, cut)

    got = draw_there()
    runtime.synchronize()
    same = sum(one == other for one, other in zip(wanted, got.cpu().tolist(), strict=True))
    elapsed_s = machine.median_s(draw_there, 5)
    return [
        must(f"draws as on the CPU, {name}", same == rows, value=f"{same}/{rows}"),
        Finding(what=f"{rows} draws of {vocabulary} tokens, {name}", value=1e3 * elapsed_s,
                unit="ms"),
    ]  # fmt: skip


def _blocks(machine: Machine, runtime: DeviceRuntime) -> Iterator[Finding]:
    layer = LayerKv(8, machine.size(128, 8), machine.size(128, 8))
    layers = (layer,) * machine.size(32, 2)
    layout = KvLayout(layers=layers, block_size=16, dtype="bfloat16", item_bytes=2)
    count = machine.size(1024, 6)
    kv = DeviceKv(layout, count, runtime)
    try:
        yield from asyncio.run(_copies(kv, count))
    finally:
        kv.close()


async def _copies(kv: DeviceKv, count: int) -> list[Finding]:
    size = kv.layout.block_bytes
    given = np.random.default_rng(4).integers(0, 256, count * size, dtype=np.uint8)
    source, back = memoryview(given.tobytes()), bytearray(count * size)
    # Every other block is a piece of its own, as after a while of serving.
    order = [*range(0, count, 2), *range(1, count, 2)]
    runs = [BlockRun(place, block, 1) for place, block in enumerate(order)]
    in_s = await _timed(kv.copy_in(source, runs))
    out_s = await _timed(kv.copy_out(back, runs))
    handoff = HandoffId(RequestId("request"), 1, 0)
    blocks = [BlockId(block) for block in order]
    indices = list(range(count))
    await kv.digests(handoff, indices[:1], blocks[:1])
    began_s = time.perf_counter()
    digests = await kv.digests(handoff, indices, blocks)
    digest_s = time.perf_counter() - began_s
    wanted = [
        block_digest(handoff, index, source[index * size : (index + 1) * size])
        for index in indices[: min(count, 64)]
    ]
    note = f"{count} blocks of {size / 2**20:.2f} MiB, one piece each"
    return [
        must("blocks come back as they went", back == source),
        must("digests as on the CPU", digests[: len(wanted)] == wanted),
        Finding(what="host to device", value=count * size / in_s / 1e9, unit="GB/s", note=note),
        Finding(what="device to host", value=count * size / out_s / 1e9, unit="GB/s", note=note),
        Finding(what="digests", value=count * size / digest_s / 1e9, unit="GB/s", note=note),
    ]


async def _timed(work: Awaitable[None]) -> float:
    began_s = time.perf_counter()
    await work
    return time.perf_counter() - began_s
