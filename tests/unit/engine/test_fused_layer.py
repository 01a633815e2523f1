from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pdserve.domain.invariants import BrokenInvariant
from pdserve.engine.attention import DenseAttention, attending
from pdserve.engine.fused_layer import fuse_layers
from pdserve.engine.fused_mlp import fuse_mlps
from pdserve.engine.fused_norm import fuse_norms
from pdserve.engine.fused_rotary import fuse_rotary
from pdserve.engine.model_probe import run_packed, use_paged
from pdserve.engine.packed_linear import pack_linears

torch.set_num_threads(1)
LIBRARY: Any = transformers
SIZES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def model_of(name: str, **settings: Any) -> Any:
    """Random weights with biases and norms that matter, and paged attention."""
    config = getattr(LIBRARY, f"{name}Config")(**SIZES, **settings)
    torch.manual_seed(3)
    model = getattr(LIBRARY, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    use_paged(model)
    return model


def fuse(model: Any) -> int:
    for prepare in (pack_linears, fuse_norms, fuse_mlps, fuse_rotary):
        prepare(model)
    return fuse_layers(model)


@torch.inference_mode()
def logits_of(model: Any, num_rows: int, first: int) -> Tensor:
    tokens = (torch.arange(num_rows) * 7 + first) % SIZES["vocab_size"]
    with attending(DenseAttention()):
        return run_packed(model, tokens, torch.arange(first, first + num_rows))


@pytest.mark.parametrize(
    ("name", "settings", "num_fused"),
    [
        ("Llama", {"attention_bias": True}, 2),
        ("Qwen2", {}, 2),
        ("Mistral", {"sliding_window": 4}, 2),
        ("Qwen3", {}, 0),  # norms of query and key
        ("Granite", {"residual_multiplier": 0.5}, 0),
        ("Granite", {"residual_multiplier": 1.0, "attention_multiplier": 0.3}, 2),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, 1),
        ("Gemma2", {}, 0),
        ("Olmo2", {}, 0),
        ("StableLm", {}, 0),  # turns a part of each head, norms are of another kind
    ],
)
def test_decoder_layer_is_fused_only_if_that_changes_nothing(
    name: str, settings: dict[str, Any], num_fused: int
) -> None:
    model = model_of(name, **settings)
    calls = [(1, 0), (1, 9), (5, 2), (70, 1)]
    expected = [logits_of(model, *call) for call in calls]
    assert fuse(model) == num_fused
    for call, right in zip(calls, expected, strict=True):
        assert torch.allclose(logits_of(model, *call), right, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_fused_layer_keeps_its_input_and_the_positions() -> None:
    layer = model_of("Llama").model.layers[1]
    rows, turns = torch.randn(1, 4, 48), (torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    kept = [part.clone() for part in (rows, *turns)]
    assert fuse(layer) == 1
    with attending(DenseAttention()):
        results = [layer(rows, position_embeddings=turns) for _ in range(2)]
    assert torch.equal(*results)
    for part, before in zip((rows, *turns), kept, strict=True):
        assert torch.equal(part, before)


@torch.inference_mode()
def test_call_of_another_kind_goes_to_the_library() -> None:
    plain, fused = model_of("Llama").model.layers[0], model_of("Llama").model.layers[0]
    assert fuse(fused) == 1
    rows, turns = torch.randn(1, 3, 48), (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    strided = tuple(part.mT.contiguous().mT for part in turns)
    with attending(DenseAttention()):
        expected = plain(rows, position_embeddings=turns)
        assert torch.allclose(fused(rows, position_embeddings=strided), expected, atol=1e-5)
        with pytest.raises(BrokenInvariant, match="no mask"):
            fused(rows, attention_mask=torch.zeros(3, 3), position_embeddings=turns)
