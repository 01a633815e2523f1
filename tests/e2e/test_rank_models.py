"""Ranks that hold a model together give the tokens and logits that transformers alone gives."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.paged_model import PagedModel
from pdserve.engine.sharding import check_divisible, load_rank_model
from pdserve.engine.sharding.thread_group import ThreadGroup
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


@pytest.mark.parametrize("name", sorted(SERVED))
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
