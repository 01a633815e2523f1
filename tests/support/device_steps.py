"""Decode steps of tiny models on the simulated device and on the CPU, recorded and held together.

Run as a module, with TRITON_INTERPRET=1, it takes the names of models, runs Triton's kernels on the
CPU and prints what differs, a line of JSON for each model.
"""

import json
import sys
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.attention import AttentionTarget, attending
from pdserve.engine.backend import BatchAttention, DenseAttention
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.device.decode_graphs import DecodeGraphs, StepLogits
from pdserve.engine.device.device_attention import DeviceAttention
from pdserve.engine.device.device_backend import DeviceBackend, bring_to
from pdserve.engine.device.device_draws import DrawPlan
from pdserve.engine.device.runtime import HOST, DeviceRuntime
from pdserve.engine.kv_store import KvStore
from pdserve.engine.model_probe import discover_layout, run_packed, use_paged
from pdserve.engine.packing import pack
from pdserve.engine.paged_cache import DTYPES, PagedCache
from tests.support.sim_device import SimRuntime
from tests.support.tiny_models import tiny_model

BLOCK_SIZE, NUM_BLOCKS, BATCH = 8, 32, 4
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}  # of other orders of adding
MAX_LENGTH = 64  # beyond every window and chunk of the tiny models


@dataclass
class Unchecked:
    """A model that was prepared as `PagedModel` prepares it, without its checks."""

    model: Any

    def run(self, token_ids: Tensor, positions: Tensor, target: AttentionTarget) -> Tensor:
        with attending(target):
            return run_packed(self.model, token_ids, positions)


class DecodeSteps:
    """Recorded decode steps of one model on one device, over KV of its own."""

    def __init__(self, model: Any, runtime: DeviceRuntime, kernels: str, dtype: str) -> None:
        backend = DeviceBackend(runtime, kernels)
        model = bring_to(model, runtime)
        use_paged(model)
        layout = discover_layout(model, block_size=BLOCK_SIZE, dtype=dtype)
        backend.prepare(model)
        self._runtime, self._backend, self._model = runtime, backend, Unchecked(model)
        self.kv: KvStore = backend.open_kv(layout, NUM_BLOCKS)
        attention: BatchAttention = backend.attention(self.kv)
        assert isinstance(attention, DeviceAttention)
        width = MAX_LENGTH // BLOCK_SIZE
        self._graphs = DecodeGraphs(
            self._model, attention, runtime, backend.stager, sizes=[BATCH], width=width
        )

    @torch.inference_mode()
    def run(self, batch: StepBatch, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, greedy tokens and the KV after a step that finds `memory` as KV."""
        self.kv.tensor().copy_(memory)
        draws = DrawPlan.of([step.sample for step in batch.sequences if step.sample], 1)
        found: StepLogits = self._graphs.run(batch, draws, BATCH)
        assert found.greedy is not None
        results = (found.logits, found.greedy, self.kv.tensor())
        self._runtime.synchronize()
        logits, greedy, kv = (each.to("cpu", copy=True) for each in results)
        return logits, greedy, kv

    @torch.inference_mode()
    def run_plainly(self, batch: StepBatch, memory: Tensor) -> Tensor:
        """Logits of the same step, on the host, request by request and without a graph."""
        self.kv.tensor().copy_(memory)
        dense = DenseAttention(PagedCache(self.kv), torch.device("cpu"))
        inputs = dense.inputs(pack(batch, BLOCK_SIZE), None)
        return self._model.run(inputs.token_ids, inputs.positions, inputs.target)

    def close(self) -> None:
        self._graphs.close()
        self.kv.close()
        self._backend.close()


def decode_batch(chooser: Random, vocab_size: int) -> StepBatch:
    """One to four requests of other lengths, tokens and blocks each time."""
    blocks = [BlockId(block) for block in range(NUM_BLOCKS)]
    chooser.shuffle(blocks)
    steps = []
    for place in range(chooser.randint(1, BATCH)):
        length = chooser.randint(1, MAX_LENGTH)
        first = place * (NUM_BLOCKS // BATCH)
        steps.append(
            SequenceStep(
                token_ids=(chooser.randrange(vocab_size),),
                start=length - 1,
                block_table=tuple(blocks[first : first + MAX_LENGTH // BLOCK_SIZE]),
                sample=SampleStep(params=SamplingParams(), token_index=1),
            )
        )
    return StepBatch(tuple(steps))


def differences(
    name: str, *, kernels: str = "torch", dtype: str = "float32", num_steps: int = 4
) -> list[str]:
    """What the simulated device computes otherwise than the CPU, bit by bit."""
    found = []
    with SimRuntime() as runtime:
        on_host, on_sim = (
            DecodeSteps(tiny_model(name).to(DTYPES[dtype]), each, kernels, dtype)
            for each in (HOST, runtime)
        )
        chooser = Random(name)
        generator = torch.Generator().manual_seed(1)
        for step in range(num_steps):
            batch = decode_batch(chooser, 160)
            numbers = torch.randn(
                on_host.kv.tensor().view(DTYPES[dtype]).shape, generator=generator
            )
            memory = numbers.to(DTYPES[dtype]).view(torch.uint8)
            expected, got = on_host.run(batch, memory), on_sim.run(batch, memory)
            for what, one, other in zip(("logits", "tokens", "KV"), expected, got, strict=True):
                if not torch.equal(one, other):
                    found.append(f"step {step} of {len(batch.sequences)}: {what}")
            plain = on_host.run_plainly(batch, memory).float()
            error = torch.linalg.vector_norm(plain - expected[0].float())
            if not error <= TOLERANCE[dtype] * torch.linalg.vector_norm(plain):
                found.append(f"step {step}: logits of a plain step are {error:.1e} apart")
        on_host.close()
        on_sim.close()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for model_name in sys.argv[1:]:
        print(json.dumps([model_name, differences(model_name, kernels="triton", num_steps=2)]))
