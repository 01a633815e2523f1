"""Random models of published shapes on the device under test, opened as the engine does it."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu_check.machine import Machine
from bench.gpu_check.runtimes import opened_runtime
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch, StepLimits
from pdserve.engine.device.device_backend import DeviceBackend, bring_to
from pdserve.engine.device.device_opening import open_stepper
from pdserve.engine.device.device_stepper import DeviceStepper
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.paged_model import PagedModel

BLOCK_SIZE = 16

SHAPES: dict[str, dict[str, int]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128_256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    },
}  # fmt: skip
"""Of Llama 3.2 1B and 3.1 8B, heads and embeddings apart; and one for CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model that `stepper` owns."""

    name: str
    model: PagedModel
    stepper: DeviceStepper
    backend: DeviceBackend
    runtime: DeviceRuntime
    num_weights: int  # that each token is multiplied with: all but the embedding
    item_bytes: int
    limits: StepLimits

    @property
    def weight_bytes(self) -> int:
        return self.num_weights * self.item_bytes

    def kv_bytes(self, num_positions: int) -> int:
        return num_positions * self.model.layout.block_bytes // BLOCK_SIZE


@contextlib.contextmanager
def opened_model(
    machine: Machine,
    name: str,
    limits: StepLimits,
    max_context_tokens: int,
    num_blocks: int,
    attention: str = "triton",
) -> Iterator[OpenedModel]:
    """With KV, kernels compiled and decode steps recorded, as a worker has it once it is ready."""
    import transformers

    library: Any = transformers
    dtype = machine.size(torch.bfloat16, torch.float32)
    config = library.LlamaConfig(
        **SHAPES[name], max_position_embeddings=max_context_tokens, tie_word_embeddings=False
    )
    torch.manual_seed(1)
    with opened_runtime(machine) as runtime:
        with machine.device:
            module = library.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        embedded = module.get_input_embeddings().weight.numel()
        num_weights = sum(each.numel() for each in module.parameters()) - embedded
        backend = DeviceBackend(runtime, attention)
        model = PagedModel(
            bring_to(module, runtime),
            block_size=BLOCK_SIZE,
            num_blocks=None,
            dtype=str(dtype).removeprefix("torch."),
            max_context_tokens=max_context_tokens,
            backend=backend,
        )
        del module
        stepper = open_stepper(
            model,
            backend,
            limits=limits,
            num_blocks=num_blocks,
            room_bytes=runtime.free_bytes(),
            max_context_tokens=max_context_tokens,
            vocab_size=config.vocab_size,
            eos_token_ids=(),
        )
        try:
            yield OpenedModel(
                name=name,
                model=model,
                stepper=stepper,
                backend=backend,
                runtime=runtime,
                num_weights=num_weights,
                item_bytes=dtype.itemsize,
                limits=limits,
            )
        finally:
            stepper.close()


class Requests:
    """Requests of random tokens with blocks of their own, all of the same length or shorter."""

    def __init__(self, opened: OpenedModel, count: int, num_tokens: int) -> None:
        per_request = -(-num_tokens // BLOCK_SIZE)
        blocks = torch.randperm(count * per_request).tolist()
        self._tables = [
            tuple(BlockId(each) for each in blocks[place * per_request :][:per_request])
            for place in range(count)
        ]
        vocab_size = SHAPES[opened.name]["vocab_size"]
        generator = torch.Generator().manual_seed(2)
        self._tokens = torch.randint(vocab_size, (count, num_tokens), generator=generator).tolist()
        self._opened = opened

    def read_prompts(self, num_tokens: int) -> int:
        """Fill the KV of the first `num_tokens` of each, in steps as large as may be; how many."""
        at_once = max(1, self._opened.limits.max_num_tokens // num_tokens)
        num_steps = 0
        for first in range(0, len(self._tables), at_once):
            places = range(first, min(first + at_once, len(self._tables)))
            self._opened.stepper.run(self.step([(place, 0, num_tokens) for place in places]))
            num_steps += 1
        return num_steps

    def step(self, spans: Sequence[tuple[int, int, int]], temperature: float = 0.0) -> StepBatch:
        """(request, first token, number of tokens) each; every one samples."""
        params = SamplingParams(temperature=temperature, seed=7)
        return StepBatch(
            tuple(
                SequenceStep(
                    token_ids=tuple(self._tokens[request][start : start + count]),
                    start=start,
                    block_table=self._tables[request],
                    sample=SampleStep(params=params, token_index=1),
                )
                for request, start, count in spans
            )
        )

    def decode(self, lengths: Sequence[int], temperature: float = 0.0) -> StepBatch:
        """A step of one token for each of the first requests, the last of so many tokens."""
        spans = zip(itertools.count(), lengths, strict=False)
        return self.step([(place, length - 1, 1) for place, length in spans], temperature)
