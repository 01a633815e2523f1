from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import GELU, Embedding, Linear, Module, SiLU

from pdserve.engine.fused_mlp import fuse_mlps
from pdserve.engine.fused_norm import fuse_norms
from pdserve.engine.fused_rotary import fuse_rotary
from pdserve.engine.packed_linear import pack_linears

torch.set_num_threads(1)


class Attention(Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = Linear(16, 24, bias=bias)
        self.k_proj = Linear(16, 8, bias=bias)
        self.v_proj = Linear(16, 8, bias=bias)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.q_proj(rows), self.k_proj(rows), self.v_proj(rows)], dim=-1)


class Tied(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding(30, 16)
        self.head = Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight


class OffsetRMSNorm(Module):
    """As Gemma has it, or with a twist that torch's own norm does not know."""

    def __init__(self, twist: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16))
        self.eps = 1e-5
        self.twist = twist

    def forward(self, rows: Tensor) -> Tensor:
        scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps)
        return rows * scale * (1 + self.weight) + self.twist


@torch.inference_mode()
def test_packed_projections_give_the_same_rows_for_every_input() -> None:
    for bias in (True, False):
        model = Attention(bias)
        inputs = [torch.randn(1, count, 16) for count in (1, 3, 70)]
        expected = [model(rows) for rows in inputs]
        assert pack_linears(model) == 3
        for rows, result in zip(inputs, expected, strict=True):
            assert torch.allclose(model(rows), result, atol=1e-6)


@torch.inference_mode()
def test_projection_called_alone_or_out_of_order_is_right() -> None:
    model = Attention(bias=True)
    first, second = torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    expected = [model.k_proj(first), model.v_proj(second), model.q_proj(first)]
    pack_linears(model)
    results = [model.k_proj(first), model.v_proj(second), model.q_proj(first)]
    for result, right in zip(results, expected, strict=True):
        assert torch.allclose(result, right, atol=1e-6)


def test_packed_weight_is_hollow_unless_something_else_uses_it() -> None:
    model = Attention(bias=False)
    shape = model.q_proj.weight.shape
    pack_linears(model)
    assert model.q_proj.weight.shape == shape
    assert bool(model.q_proj.weight.isnan().all())
    tied = Tied()
    pack_linears(tied)
    assert not bool(tied.embed.weight.isnan().any())


@torch.inference_mode()
def test_norm_is_fused_only_if_that_changes_nothing() -> None:
    rows = torch.randn(2, 3, 16)
    plain = OffsetRMSNorm(0.0)
    expected = plain(rows)
    assert fuse_norms(plain) == 1
    assert torch.allclose(plain(rows), expected, atol=1e-6)
    assert fuse_norms(OffsetRMSNorm(0.01)) == 0


class Gated(Module):
    def __init__(self, activation: Module) -> None:
        super().__init__()
        self.gate_proj = Linear(16, 40)
        self.up_proj = Linear(16, 40)
        self.down_proj = Linear(40, 16)
        self.act_fn = activation

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return result


@torch.inference_mode()
def test_gated_layer_is_fused_only_if_that_changes_nothing() -> None:
    for activation, num_fused in ((SiLU(), 1), (GELU(), 0)):
        model = Gated(activation)
        inputs = [30 * torch.randn(1, count, 16) for count in (1, 3, 70)]
        expected = [model(rows) for rows in inputs]
        pack_linears(model)
        assert fuse_mlps(model) == num_fused
        for rows, result in zip(inputs, expected, strict=True):
            assert torch.allclose(model(rows), result, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_rotary_embedding_is_fused_for_every_layout_of_rows() -> None:
    modeling: Any = transformers.models.llama.modeling_llama
    config = transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8
    )
    attention = modeling.LlamaAttention(config, 0)
    assert fuse_rotary(attention) == 1
    rotary = attention.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert rotary is not modeling.apply_rotary_pos_emb
    joined, cos, sin = torch.randn(1, 5, 80), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    query, key = joined[..., :48].view(1, 5, 6, 8), joined[..., 48:64].view(1, 5, 2, 8)
    scattered = torch.randn(1, 2, 5, 8)  # heads first
    for other in (key.transpose(1, 2), scattered):
        results = rotary(query.transpose(1, 2), other, cos, sin)
        expected = modeling.apply_rotary_pos_emb(query.transpose(1, 2), other, cos, sin)
        for result, right in zip(results, expected, strict=True):
            assert torch.allclose(result, right, atol=1e-6)
    results = rotary(query.transpose(1, 2)[:, :2], query.transpose(1, 2)[:, 3:], cos, sin)
    expected = modeling.apply_rotary_pos_emb(
        query.transpose(1, 2)[:, :2], query.transpose(1, 2)[:, 3:], cos, sin
    )
    for result, right in zip(results, expected, strict=True):  # beside each other, with a gap
        assert torch.allclose(result, right, atol=1e-6)
