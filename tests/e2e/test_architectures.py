"""Each supported architecture gives the tokens and logits that transformers alone gives."""

import pytest
import torch

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.paged_model import PagedModel
from tests.support.greedy_runs import BLOCK_SIZE, NUM_BLOCKS, generated, random_prompts, run_all
from tests.support.tiny_models import REFUSED, ROPES, SERVED, tiny_model

MAX_LOGIT_DIFFERENCE = 3e-5


@pytest.mark.parametrize("name", sorted({**SERVED, **ROPES}))
def test_tokens_and_logits_equal_those_of_transformers(name: str) -> None:
    model = tiny_model(name)
    prompts = random_prompts()
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
