"""A small model stands for a large one when a division is tried."""

import pytest
import torch
import transformers

from pdserve.domain.errors import LocalFault
from pdserve.engine.sharding import check, cutting
from pdserve.engine.sharding.building import build_empty
from pdserve.engine.sharding.twin import twin_config
from tests.support.tiny_models import tiny_model

MAX_NUM_PARAMETERS = 8e6


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v3", "gpt_oss", "olmo2"])
def test_twins_of_large_models_are_small_and_divide_as_these_do(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)  # of the size that gave the class its name
    small = twin_config(config, tp=2, pp=2)
    num_parameters = sum(each.numel() for each in build_empty(small, torch.float32).parameters())
    assert num_parameters < MAX_NUM_PARAMETERS
    check.check_twin(config, tp=2, pp=2)


def test_a_cut_that_computes_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of gpt-oss alternate; cut as halves, every shape is right."""
    monkeypatch.setattr(cutting, "_INTERLEAVED", ())
    config = tiny_model("gpt_oss").config
    with pytest.raises(
        LocalFault, match=r"tp 2: a small model .* computes other logits than whole"
    ):
        check.check_twin(config, tp=2, pp=1)


def test_stages_are_named_if_they_are_what_does_not_work() -> None:
    """Its layers take inputs that are made of the embedding, which later stages do not have."""
    config = tiny_model(
        "gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=160
    ).config
    with pytest.raises(LocalFault, match=r"cannot be served with pp 2: .*; serve it on one rank"):
        check.check_twin(config, tp=2, pp=2)
