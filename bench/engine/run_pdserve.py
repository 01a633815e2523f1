"""Our engine under a small first-come scheduler: the same steps that workers take.

`python -m bench.engine.run_pdserve MODEL_DIR DTYPE [ATTENTION]`
"""

import asyncio
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.engine.runner import Prompts, dtype, model_dir, serve
from pdserve.domain.prefix import hash_full_blocks
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.block_pool import BlockPool, BlockTable
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.torch_engine import TorchEngine

BLOCK_SIZE = 16
NUM_BLOCKS = 1024
MAX_NUM_STEP_TOKENS = 256


@dataclass
class Running:
    prompt: list[int]
    params: SamplingParams
    table: BlockTable
    num_computed: int
    output: list[int] = field(default_factory=list)

    def next_step(self, budget: int) -> SequenceStep:
        start = self.num_computed
        token_ids = tuple(self.output[-1:] or self.prompt[start : start + budget])
        is_last = start + len(token_ids) >= len(self.prompt)
        sample = SampleStep(params=self.params, token_index=len(self.output)) if is_last else None
        return SequenceStep(
            token_ids=token_ids, start=start, block_table=self.table.block_ids, sample=sample
        )


class Scheduler:
    """Decode tokens first, then prompts in order of arrival within the step's token budget."""

    def __init__(
        self,
        engine: TorchEngine,
        *,
        num_blocks: int = NUM_BLOCKS,
        max_num_step_tokens: int = MAX_NUM_STEP_TOKENS,
    ) -> None:
        self._engine = engine
        self._num_blocks, self._max_num_step_tokens = num_blocks, max_num_step_tokens
        self._pool = BlockPool(num_blocks)

    def generate(self, prompts: Prompts, num_new_tokens: int) -> Sequence[Sequence[int]]:
        params = SamplingParams(max_tokens=num_new_tokens, ignore_eos=True)
        waiting = deque(enumerate(prompts))
        running: list[Running] = []
        outputs: list[list[int]] = [[] for _ in prompts]
        while waiting or running:
            budget = self._max_num_step_tokens - len(running)
            while waiting and sum(len(each.prompt) for each in running if not each.output) < budget:
                admitted = self._admit(waiting[0][1], params, outputs[waiting[0][0]])
                if admitted is None:
                    break
                waiting.popleft()
                running.append(admitted)
            self._step(running)
            for each in running:
                if len(each.output) == num_new_tokens:
                    asyncio.run(each.table.publish(self._names(each.prompt)))
                    each.table.release()
            running = [each for each in running if len(each.output) < num_new_tokens]
        self._pool = BlockPool(self._num_blocks)  # every repetition starts with a cold prefix cache
        return outputs

    def _names(self, prompt: list[int]) -> tuple[bytes, ...]:
        return hash_full_blocks(prompt[:-1], BLOCK_SIZE)

    def _admit(
        self, prompt: list[int], params: SamplingParams, output: list[int]
    ) -> Running | None:
        num_blocks = -(-(len(prompt) + params.max_tokens) // BLOCK_SIZE)
        table = self._pool.reserve(num_blocks, self._names(prompt))
        if table is None:
            return None
        table.hold(table.num_cached_blocks, num_blocks - table.num_cached_blocks)
        return Running(prompt, params, table, table.num_cached_blocks * BLOCK_SIZE, output)

    def _step(self, running: list[Running]) -> None:
        budget = self._max_num_step_tokens
        chosen, sequences = [], []
        for each in sorted(running, key=lambda each: not each.output):
            if budget == 0:
                break
            sequence = each.next_step(budget)
            budget -= len(sequence.token_ids)
            chosen.append(each)
            sequences.append(sequence)
        result = self._engine.compute(StepBatch(tuple(sequences)))
        for each, sequence, token in zip(chosen, sequences, result.sampled, strict=True):
            each.num_computed += len(sequence.token_ids)
            if isinstance(token, SampledToken):
                each.output.append(token.token_id)


if __name__ == "__main__":
    engine = TorchEngine.load(
        Path(model_dir()),
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        dtype=dtype(),
        attention=sys.argv[3] if len(sys.argv) > 3 else "auto",
    )
    serve(Scheduler(engine).generate)
