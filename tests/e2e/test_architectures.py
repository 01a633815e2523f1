"""Each supported architecture gives the tokens and logits that transformers alone gives."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.lengths import LengthRule
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.paged_model import PagedModel
from tests.support.tiny_models import REFUSED, ROPES, SERVED, tiny_model

BLOCK_SIZE = 8
NUM_BLOCKS = 48
CHUNK = 13
NUM_NEW_TOKENS = 24
PROMPT_LENGTHS = (21, 47, 5)
LATE_STEP = 3  # the last prompt joins here
MAX_LOGIT_DIFFERENCE = 3e-5


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


def run_all(paged: PagedModel, prompts: list[list[int]]) -> list[Running]:
    """Chunked prefill, decode and a late prompt in mixed batches, greedy, in shuffled blocks."""
    blocks = [BlockId(block) for block in range(NUM_BLOCKS)]
    random.Random(5).shuffle(blocks)
    free = iter(blocks)
    running = []
    for index, prompt in enumerate(prompts):
        num_blocks = -(-(len(prompt) + NUM_NEW_TOKENS) // BLOCK_SIZE)
        table = tuple(itertools.islice(free, num_blocks))
        joins_at = LATE_STEP if index == len(prompts) - 1 else 0
        running.append(Running(prompt=prompt, block_table=table, joins_at=joins_at))
    for step in itertools.count():
        active = [
            each for each in running if each.joins_at <= step and len(each.output) < NUM_NEW_TOKENS
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
def generated(model: Any, prompt: list[int]) -> tuple[list[int], Tensor]:
    """What transformers alone answers to one prompt: tokens, and logits of each."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = [int(token_id) for token_id in output.sequences[0, len(prompt) :]]
    return tokens, torch.cat(output.logits)


@pytest.mark.parametrize("name", sorted({**SERVED, **ROPES}))
def test_tokens_and_logits_equal_those_of_transformers(name: str) -> None:
    model = tiny_model(name)
    chooser = random.Random(7)
    prompts = [[chooser.randrange(2, 160) for _ in range(length)] for length in PROMPT_LENGTHS]
    expected = [generated(model, prompt) for prompt in prompts]

    paged = PagedModel(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32")
    running = run_all(paged, prompts)
    paged.close()

    assert [each.output for each in running] == [tokens for tokens, _ in expected]
    for each, (_, logits) in zip(running, expected, strict=True):
        difference = float((torch.stack(each.logits) - logits).abs().max())
        assert difference < MAX_LOGIT_DIFFERENCE


def test_temperature_of_llama4_follows_positions_not_rows() -> None:
    model = tiny_model("llama4_text")
    for module in model.modules():
        if hasattr(module, "floor_scale"):
            module.floor_scale, module.attn_scale = 10, 0.7
    prompts = [[(7 * place + length) % 158 + 2 for place in range(length)] for length in (40, 3)]
    expected = [generated(model, prompt)[0] for prompt in prompts]
    paged = PagedModel(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32")
    assert [each.output for each in run_all(paged, prompts)] == expected
    paged.close()


def whole(token_ids: list[int], blocks: range, start: int = 0) -> SequenceStep:
    return SequenceStep(
        token_ids=tuple(token_ids),
        start=start,
        block_table=tuple(BlockId(block) for block in blocks),
        sample=SampleStep(params=SamplingParams(), token_index=0),
    )


@pytest.mark.parametrize("attention", ["auto", "torch"])
@pytest.mark.parametrize("name", sorted(SERVED))
def test_rows_of_bad_numbers_stay_bad_and_leave_the_others_alone(name: str, attention: str) -> None:
    """One prompt's embedding is NaN, and so is all KV memory that nobody has written."""
    paged = PagedModel(
        tiny_model(name), block_size=8, num_blocks=12, dtype="float32", attention=attention
    )
    good, bad_id = [5, 9, 33, 77, 2, 100, 31, 8, 7, 6, 5, 4, 3], 150
    prompt, token = whole(good, range(2)), whole([44], range(2), 13)
    alone = [paged.forward(StepBatch((step,)))[0].clone() for step in (prompt, token)]
    with torch.no_grad():
        paged._model.get_input_embeddings().weight[bad_id] = torch.nan
    assert isinstance(paged.kv, KvMemory)
    paged.kv.bytes[:] = b"\xff" * paged.kv.num_bytes
    bad, worse = whole([5, 9, bad_id, 3], range(2, 3)), whole([bad_id] * 20, range(3, 6))
    read = paged.forward(StepBatch((bad, prompt, worse)))
    bad, worse = whole([7], range(2, 3), 4), whole([bad_id], range(3, 6), 20)
    written = paged.forward(StepBatch((bad, token, worse)))
    for logits, expected in zip((read, written), alone, strict=True):
        assert float((logits[1] - expected).abs().max()) < MAX_LOGIT_DIFFERENCE
        assert not torch.isfinite(logits[[0, 2]]).any()
    paged.close()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_model_that_cannot_be_served_is_refused_with_its_name(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(LocalFault, match=f"model type {name.partition('/')[0]} cannot be served"):
        PagedModel(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32")


def test_model_whose_numbers_overflow_is_refused_for_that() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(LocalFault, match="logits are NaN or infinite in float32; try another"):
        PagedModel(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32")


def test_model_that_rules_tokens_out_is_served() -> None:
    model = tiny_model("phi")  # its output layer has a bias
    with torch.no_grad():
        model.lm_head.bias[[3, 7]] = -torch.inf
    paged = PagedModel(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32")
    [logits] = paged.forward(StepBatch((whole([5, 9], range(1)),)))
    assert (logits == -torch.inf).nonzero().flatten().tolist() == [3, 7]
    paged.close()


def test_at_least_forty_architectures_are_verified() -> None:
    assert len({name.partition("/")[0] for name in SERVED}) >= 40
