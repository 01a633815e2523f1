"""Ranks that hold a model together give the tokens and logits that transformers alone gives."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdserve.engine.model_files import ModelFiles
from pdserve.engine.paged_model import PagedModel
from pdserve.engine.sharding import load_rank_model
from pdserve.engine.sharding.thread_group import ThreadGroup
from tests.support.greedy_runs import BLOCK_SIZE, NUM_BLOCKS, generated, random_prompts, run_all
from tests.support.rank_threads import rank_threads
from tests.support.tiny_models import save_tiny_model, tiny_model

VOCAB_SIZE = 163  # divides by no number of ranks
MAX_DIFFERENCE = 1e-5  # of logits, relative to their standard deviation


def load(files: ModelFiles, group: ThreadGroup) -> PagedModel:
    return PagedModel(
        load_rank_model(files, "float32", group.place, group),
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        dtype="float32",
        max_context_tokens=files.max_context_tokens,
    )


@cache
def expected_of(name: str) -> list[tuple[list[int], Tensor]]:
    model = tiny_model(name, vocab_size=VOCAB_SIZE, eos_token_id=2)
    model.generation_config.eos_token_id = None
    return [generated(model, prompt) for prompt in random_prompts()]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("name", ["llama"])
def test_tokens_and_logits_equal_those_of_one_process(
    name: str, tp: int, pp: int, tmp_path: Path
) -> None:
    save_tiny_model(name, tmp_path, vocab_size=VOCAB_SIZE, eos_token_id=2)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)  # its end tokens are beyond
    files = ModelFiles.open(tmp_path)
    with rank_threads(tp, pp, lambda group: load(files, group)) as ranks:
        running = run_all(ranks, random_prompts())
    expected = expected_of(name)
    assert [each.output for each in running] == [tokens for tokens, _ in expected]
    for each, (_, logits) in zip(running, expected, strict=True):
        difference = float((torch.stack(each.logits) - logits).abs().max() / logits.std())
        assert difference < MAX_DIFFERENCE
