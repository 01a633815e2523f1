"""Attention of models as they are published: sizes of the largest or the most common of a type."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from pdserve.domain.layout import LayerKv
from pdserve.engine.device.variants import AttentionKind


@dataclass(frozen=True, slots=True)
class Published:
    """One kind of layer of a model, whose KV has `num_layers` layers of this size."""

    model: str
    heads: int
    layer: LayerKv
    num_layers: int
    window: int = 0
    chunk: int = 0
    is_capped: bool = False
    has_sinks: bool = False


def _same(
    model: str, heads: int, kv_heads: int, dim: int, num_layers: int, **features: Any
) -> Published:
    return Published(model, heads, LayerKv(kv_heads, dim, dim), num_layers, **features)


PUBLISHED = (
    _same("llama 3.2 1B", 32, 8, 64, 16),
    _same("llama 3.1 8B, granite 3 8B, qwen3 8B, ministral 8B", 32, 8, 128, 32),
    _same("llama 3.1 70B, qwen2.5 72B", 64, 8, 128, 80),
    _same("qwen2.5 0.5B", 14, 2, 64, 24),
    _same("qwen2.5 7B", 28, 4, 128, 28),
    _same("qwen2.5 32B, olmo 3 32B, seed_oss, mistral small", 40, 8, 128, 64),
    _same("qwen2 with its window on", 28, 4, 128, 28, window=4096),
    _same("qwen3 0.6B", 16, 8, 128, 28),
    _same("qwen3_moe 235B", 64, 4, 128, 94),
    _same("qwen2_moe 2.7B, olmoe 7B, olmo2 7B, nemotron", 16, 16, 128, 24),
    _same("mixtral 8x22B, minimax_m2", 48, 8, 128, 56),
    _same("mistral 7B with its window", 32, 8, 128, 32, window=4096),
    _same("gemma 2B, one KV head", 8, 1, 256, 18),
    _same("gemma2 9B, full", 16, 8, 256, 42, is_capped=True),
    _same("gemma2 9B, window", 16, 8, 256, 42, window=4096, is_capped=True),
    _same("gemma2 27B, window", 32, 16, 128, 46, window=4096, is_capped=True),
    _same("gemma3 1B", 4, 1, 256, 26, window=512),
    _same("gemma3 27B", 32, 16, 128, 62, window=1024),
    _same("gemma4 31B, window", 32, 16, 256, 60, window=1024),
    _same("gemma4 31B, full", 32, 4, 512, 60),
    _same("phi 2", 32, 32, 80, 32),
    _same("phi3 mini", 32, 32, 96, 32, window=2047),
    _same("phi3 medium, phimoe", 40, 10, 128, 40),
    _same("starcoder2 3B", 24, 2, 128, 30, window=4096),
    _same("gpt_bigcode, starcoder", 48, 1, 128, 40),
    _same("gpt2", 12, 12, 64, 12),
    _same("opt 2.7B, stablelm 3B", 32, 32, 80, 32),
    _same("gpt_neox 20B", 64, 64, 96, 44),
    _same("cohere command r", 64, 64, 128, 40),
    _same("cohere2 7B", 32, 8, 128, 32, window=4096),
    _same("glm4 9B", 32, 2, 128, 40),
    _same("glm4_moe 355B", 96, 8, 128, 92),
    _same("ernie4_5 0.3B", 16, 2, 128, 18),
    _same("persimmon 8B", 64, 64, 64, 36),
    _same("gpt_oss, full", 64, 8, 64, 36, has_sinks=True),
    _same("gpt_oss, window", 64, 8, 64, 36, window=128, has_sinks=True),
    _same("llama4 scout", 40, 8, 128, 48),
    _same("llama4 scout, chunks", 40, 8, 128, 48, chunk=8192),
    Published("deepseek_v2 lite", 16, LayerKv(16, 192, 128), 27),
    Published("deepseek_v3", 128, LayerKv(128, 192, 128), 61),
)


def kind_of(published: Published, dtype: str, block_size: int = 16) -> AttentionKind:
    """As the layout of `pdserve.domain.layout.KvLayout` has it: place, then head."""
    layer = published.layer
    block = published.num_layers * block_size * layer.num_values_per_token
    return AttentionKind(
        dtype=dtype,
        heads=published.heads,
        kv_heads=layer.num_kv_heads,
        k_head_dim=layer.k_head_dim,
        v_head_dim=layer.v_head_dim,
        block_size=block_size,
        k_strides=(block, layer.num_kv_heads * layer.k_head_dim, layer.k_head_dim),
        v_strides=(block, layer.num_kv_heads * layer.v_head_dim, layer.v_head_dim),
        window=published.window,
        chunk=published.chunk,
        is_capped=published.is_capped,
        has_sinks=published.has_sinks,
    )


REALISTIC = tuple(
    kind_of(each, dtype) for each, dtype in product(PUBLISHED, ("bfloat16", "float16", "float32"))
)
_WORST_NAMES = ("gemma2 9B, window", "deepseek_v3", "gpt_oss, window")
WORST = tuple(kind_of(each, "bfloat16") for each in PUBLISHED if each.model in _WORST_NAMES)
"""The most registers and memory, and the most features."""
