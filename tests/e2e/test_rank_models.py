"""Ranks that hold a model together give the tokens and logits that transformers alone gives."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.paged_model import PagedModel
from pdserve.engine.sharding import check_divisible, load_rank_model
from pdserve.engine.sharding.thread_group import ThreadGroup, thread_groups
from tests.support.greedy_runs import BLOCK_SIZE, NUM_BLOCKS, generated, random_prompts, run_all
from tests.support.rank_threads import rank_threads
from tests.support.tiny_models import ROPES, SERVED, save_tiny_model, tiny_model

VOCAB_SIZE = 163  # divides by no number of ranks
MAX_DIFFERENCE = 1e-5  # of logits, relative to their standard deviation
NUM_NEW_TOKENS = 8
MODELS = Path("docs/models.md")

DERIVED = "takes the hidden size for the width of all heads together"
UNDIVIDED: dict[str, str] = {
    "biogpt": DERIVED,
    "gpt2": DERIVED,
    "gpt_bigcode": DERIVED,
    "gpt_neox": DERIVED,
    "helium": DERIVED,
    "olmoe": DERIVED,
    "opt": DERIVED,
    "persimmon": DERIVED,
    "stablelm": DERIVED,
}
"""Model types that are not divided by TP, and a word of the reason."""

KV_HEADS: dict[str, dict[str, Any]] = {
    "4 KV heads": {"num_key_value_heads": 4},
    "1 KV head": {"num_key_value_heads": 1},
}
BY_STAGES = [(1, 2)]
BY_BOTH = [(2, 1), (4, 1), (2, 2), (4, 2)]


def is_divided(name: str) -> bool:
    return name.partition("/")[0] not in UNDIVIDED


def files_of(name: str, model_dir: Path, **changes: Any) -> ModelFiles:
    """The tiny model in a directory, without end tokens beyond its vocabulary."""
    changes = {"vocab_size": VOCAB_SIZE, "eos_token_id": 2, **changes}
    save_tiny_model(name, model_dir, **changes)
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    return ModelFiles.open(model_dir)


def load(files: ModelFiles, group: ThreadGroup, dtype: str = "float32") -> PagedModel:
    return PagedModel(
        load_rank_model(files, dtype, group.place, group),
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        dtype=dtype,
        max_context_tokens=files.max_context_tokens,
    )


@cache
def expected_of(name: str, changes: tuple[tuple[str, Any], ...]) -> list[tuple[list[int], Tensor]]:
    model = tiny_model(name, vocab_size=VOCAB_SIZE, **dict(changes))
    model.generation_config.eos_token_id = None
    return [generated(model, prompt, NUM_NEW_TOKENS) for prompt in random_prompts()]


def check_equal(name: str, tp: int, pp: int, model_dir: Path, **changes: Any) -> None:
    """Chunked prefill and decode in mixed batches, by ranks that are threads."""
    files = files_of(name, model_dir, **changes)
    with rank_threads(tp, pp, lambda group: load(files, group)) as ranks:
        running = run_all(ranks, random_prompts(), NUM_NEW_TOKENS)
    expected = expected_of(name, tuple(sorted(changes.items())))
    assert [each.output for each in running] == [tokens for tokens, _ in expected]
    for each, (_, logits) in zip(running, expected, strict=True):
        difference = float((torch.stack(each.logits) - logits).abs().max() / logits.std())
        assert difference < MAX_DIFFERENCE


@pytest.mark.parametrize("name", [*sorted(SERVED), "phi3/longrope", "gemma3_text/two-switches"])
def test_tokens_and_logits_equal_those_of_one_process(name: str, tmp_path: Path) -> None:
    check_equal(name, 2 if is_divided(name) else 1, 2, tmp_path)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_kv_heads_are_divided_or_held_by_several(
    name: str, kv_heads: str, tp: int, pp: int, tmp_path: Path
) -> None:
    check_equal(name, tp, pp, tmp_path, **KV_HEADS[kv_heads])


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [*BY_STAGES, *BY_BOTH])
@pytest.mark.parametrize("name", sorted({**SERVED, **ROPES}))
def test_tokens_and_logits_are_equal_in_every_division(
    name: str, tp: int, pp: int, tmp_path: Path
) -> None:
    if tp > 1 and not is_divided(name):
        pytest.skip("not divided by TP")
    check_equal(name, tp, pp, tmp_path)


@pytest.mark.parametrize("name", sorted(UNDIVIDED))
def test_models_that_cannot_be_cut_are_refused_with_what_can_serve_them(
    name: str, tmp_path: Path
) -> None:
    files = files_of(name, tmp_path)
    with pytest.raises(LocalFault) as refusal:
        check_divisible(files, 2, 1)
    assert f"model type {name} cannot be served with tp 2" in refusal.value.message
    assert UNDIVIDED[name] in refusal.value.message
    assert "whole layers (tp 1, pp up to 3), or serve it on one rank" in refusal.value.message
    check_divisible(files, 1, 2)


def test_ranks_compute_in_bfloat16_as_one_process_does(tmp_path: Path) -> None:
    files = files_of("llama", tmp_path)
    with rank_threads(1, 1, lambda group: load(files, group, "bfloat16")) as whole:
        expected = torch.stack(run_all(whole, random_prompts(), 1)[0].logits)
    with rank_threads(2, 2, lambda group: load(files, group, "bfloat16")) as ranks:
        logits = torch.stack(run_all(ranks, random_prompts(), 1)[0].logits)
    assert logits.dtype is torch.bfloat16
    assert float((logits - expected).abs().max()) < 0.1 * float(expected.std())


def test_bad_numbers_of_one_token_do_not_reach_others(tmp_path: Path) -> None:
    """A shard that has not the token looks another one up in its place."""
    files = files_of("llama", tmp_path, tie_word_embeddings=False)
    with rank_threads(2, 1, lambda group: load(files, group)) as ranks:
        prompt = [5, 9, 33, 77, 2, 100, 31, 8]
        [alone] = ranks.forward(StepBatch((whole_prompt(prompt, 0),)))
        for rank in ranks.ranks:
            rank._model.get_input_embeddings().weight[0] = torch.nan
        good = whole_prompt([token for token in prompt if token], 2)
        [logits] = ranks.forward(StepBatch((good,)))
        assert torch.equal(logits, alone)


def whole_prompt(token_ids: list[int], block: int) -> SequenceStep:
    return SequenceStep(
        token_ids=tuple(token_ids),
        start=0,
        block_table=(BlockId(block),),
        sample=SampleStep(params=SamplingParams(), token_index=0),
    )


@pytest.mark.parametrize(
    ("changes", "tp", "pp", "message"),
    [
        ({"hidden_size": 96, "num_attention_heads": 6}, 4, 1, "its num_attention_heads 6 does not"),
        (
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
            2,
            1,
            "3 KV heads",
        ),
        ({"intermediate_size": 90}, 4, 1, "its intermediate_size 90 does not divide by it"),
        ({}, 1, 4, "pp must be at most 3, the number of layers of .*; got 4"),
    ],
)
def test_sizes_that_do_not_divide_are_named(
    changes: dict[str, Any], tp: int, pp: int, message: str, tmp_path: Path
) -> None:
    files = files_of("llama", tmp_path, **changes)
    with pytest.raises(LocalFault, match=message):
        check_divisible(files, tp, pp)


def test_ranks_refuse_files_that_do_not_fit_the_config(tmp_path: Path) -> None:
    files_of("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    group = thread_groups(2, 2)[1]
    for changed, message in (
        ({name: tensors[name][:-1].clone()}, f"{name} is 95 x 64 in the weights, and 96 x 64"),
        ({f"{name}_more": torch.ones(1)}, f"does not use: {name}_more"),
    ):
        save_file({**tensors, **changed}, tmp_path / "model.safetensors")
        with pytest.raises(LocalFault, match=message):
            load_rank_model(ModelFiles.open(tmp_path), "float32", group.place, group)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LocalFault, match=f"lacks weights of the model: {name}"):
        load_rank_model(ModelFiles.open(tmp_path), "float32", group.place, group)


def test_docs_say_which_models_are_divided() -> None:
    text = MODELS.read_text(encoding="utf-8")
    section = text.partition("## Ranks")[2].partition("\n## ")[0]
    listed = {
        line.split("|")[1].strip(): set(re.findall(r"[a-z0-9_]+", line.split("|")[2]))
        for line in section.splitlines()
        if line.startswith("| by ")
    }
    kinds = {name.partition("/")[0] for name in SERVED}
    assert listed["by tp and pp"] == kinds - set(UNDIVIDED)
    assert listed["by pp only"] == set(UNDIVIDED)
    assert len(listed["by tp and pp"]) >= 36
