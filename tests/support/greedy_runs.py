"""Greedy answers to a few prompts in mixed batches, and what transformers alone answers."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pdserve.domain.ids import BlockId
from pdserve.domain.lengths import LengthRule
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch

BLOCK_SIZE = 8
NUM_BLOCKS = 48
CHUNK = 13
NUM_NEW_TOKENS = 24
PROMPT_LENGTHS = (21, 47, 5)
LATE_STEP = 3  # the last prompt joins here


class Model(Protocol):
    """A `PagedModel`, or what acts as one."""

    @property
    def length_rule(self) -> LengthRule: ...

    def forward(self, batch: StepBatch) -> Tensor: ...


@dataclass
class Running:
    """One prompt on its way: what was computed and what was drawn."""

    prompt: list[int]
    block_table: tuple[BlockId, ...]
    joins_at: int
    num_computed: int = 0
    output: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def next_step(self) -> SequenceStep:
        known = self.prompt + self.output
        end = min(self.num_computed + CHUNK, len(known))
        sample = SampleStep(params=SamplingParams(), token_index=len(self.output))
        return SequenceStep(
            token_ids=tuple(known[self.num_computed : end]),
            start=self.num_computed,
            block_table=self.block_table,
            sample=sample if end == len(known) else None,
            num_tokens=len(known),
        )

    def recompute_if_due(self, rule: LengthRule) -> None:
        """As decode workers do it."""
        num_tokens = len(self.prompt) + len(self.output)
        before = rule.regime(max(num_tokens - 1, len(self.prompt)))
        if rule.recomputes and rule.regime(num_tokens) > before:
            self.num_computed = 0


def run_all(
    paged: Model, prompts: list[list[int]], num_new_tokens: int = NUM_NEW_TOKENS
) -> list[Running]:
    """Chunked prefill, decode and a late prompt in mixed batches, greedy, in shuffled blocks."""
    blocks = [BlockId(block) for block in range(NUM_BLOCKS)]
    random.Random(5).shuffle(blocks)
    free = iter(blocks)
    running = []
    for index, prompt in enumerate(prompts):
        num_blocks = -(-(len(prompt) + num_new_tokens) // BLOCK_SIZE)
        table = tuple(itertools.islice(free, num_blocks))
        joins_at = LATE_STEP if index == len(prompts) - 1 else 0
        running.append(Running(prompt=prompt, block_table=table, joins_at=joins_at))
    for step in itertools.count():
        active = [
            each for each in running if each.joins_at <= step and len(each.output) < num_new_tokens
        ]
        if not active:
            return running
        sequences = tuple(each.next_step() for each in active)
        rows = iter(paged.forward(StepBatch(sequences)))
        for each, sequence in zip(active, sequences, strict=True):
            each.num_computed += len(sequence.token_ids)
            if sequence.sample is not None:
                logits = next(rows)
                each.logits.append(logits)
                each.output.append(int(logits.argmax()))
                each.recompute_if_due(paged.length_rule)
    raise AssertionError("unreachable")


@torch.inference_mode()
def generated(
    model: Any, prompt: list[int], num_new_tokens: int = NUM_NEW_TOKENS
) -> tuple[list[int], Tensor]:
    """What transformers alone answers to one prompt: tokens, and logits of each."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = [int(token_id) for token_id in output.sequences[0, len(prompt) :]]
    return tokens, torch.cat(output.logits)


def random_prompts(vocab_size: int = 160) -> list[list[int]]:
    chooser = random.Random(7)
    return [[chooser.randrange(2, vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
