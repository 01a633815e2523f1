"""The decoder layer of most families, with little between its products.

There the library's code runs some sixty small operations. Each is cheap, but the products have
filled the processor's caches with weights, so that what small operations need, code included, comes
from memory each time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pdserve.engine.attention import AttentionCall, DenseAttention, attend, attending
from pdserve.engine.fused_mlp import is_same, replace_forwards
from pdserve.engine.fused_norm import RmsNorm
from pdserve.engine.numba_rows import compile_rows
from pdserve.engine.packed_linear import JoinedLinears, joined_by

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_WITHOUT_EFFECT = {"position_ids", "use_cache", "cache_position"}
_NUM_TRIED_ROWS = 5
_Forward = Callable[..., Tensor]


@torch.inference_mode()
def fuse_layers(model: Module) -> int:
    """Give each plain decoder layer of float32 a forward without detours; returns how many.

    Plain is: a norm, attention whose heads are of one size and turned by halves, a residual sum; a
    norm, an MLP, a residual sum. Call it after `pack_linears` and `fuse_norms`. Names say little of
    what a layer does, so each is tried on random rows, and left alone unless the results are equal
    to rounding.
    """
    return replace_forwards(model, _fused_forward)


class _Recorder(DenseAttention):
    """Attends, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        return super().attend(call)


def _fused_forward(module: Module) -> _Forward | None:
    parts: dict[str, Any] = module._modules
    if set(parts) != _PARTS or "o_proj" not in parts["self_attn"]._modules:
        return None
    norms = [parts[name].forward for name in ("input_layernorm", "post_attention_layernorm")]
    product = joined_by([parts["self_attn"]._modules.get(name) for name in _PROJECTIONS])
    if product is None or not all(isinstance(norm, RmsNorm) for norm in norms):
        return None
    dim = getattr(parts["self_attn"], "head_dim", 0)
    if not isinstance(dim, int) or dim < 2 or dim % 2 or any(size % dim for size in product.sizes):
        return None
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, _NUM_TRIED_ROWS, norms[0].width, generator=generator)
    turns = tuple(torch.randn(1, _NUM_TRIED_ROWS, dim, generator=generator) for _ in range(2))
    recorder = _Recorder()
    try:
        with attending(recorder):
            expected = module(rows, attention_mask=None, position_embeddings=turns)
    except Exception:  # noqa: BLE001 - any model code: a layer that is called otherwise
        return None
    if len(recorder.calls) != 1:
        return None
    forward = _layer(module, product, dim, recorder.calls[0])
    with attending(DenseAttention()):
        result = forward(rows, attention_mask=None, position_embeddings=turns)
    return forward if is_same(result, expected) else None


def _layer(module: Any, product: JoinedLinears, dim: int, sample: AttentionCall) -> _Forward:
    """The forward. Its attention is that of `sample` but for query, key and value."""
    plain, mlp, out_of = module.forward, module.mlp, module.self_attn.o_proj
    norm, next_norm = module.input_layernorm.forward, module.post_attention_layernorm.forward
    turn, width = compile_rows().turn, sum(product.sizes)
    num_queries, num_turned = product.sizes[0] // dim, sum(product.sizes[:2]) // dim
    layer, scaling, window, chunk = sample.layer, sample.scaling, sample.window, sample.chunk
    softcap, sinks, temperature = sample.softcap, sample.sinks, sample.temperature

    def forward(rows: Tensor, *others: Any, **options: Any) -> Tensor:
        result: Tensor
        turns = options.get("position_embeddings")
        if others or not _is_plain(rows, turns, dim, options):
            result = plain(rows, *others, **options)
            return result
        joined = product.run(norm(rows))
        turn(joined.view(-1).numpy(), width, num_turned, *_flat(turns), dim)
        heads = joined.view(-1, width // dim, dim).transpose(0, 1)
        call = AttentionCall(
            layer=layer,
            query=heads[:num_queries],
            key=heads[num_queries:num_turned],
            value=heads[num_turned:],
            scaling=scaling,
            window=window,
            chunk=chunk,
            softcap=softcap,
            sinks=sinks,
            temperature=temperature,
        )
        out = out_of(attend(call).reshape(1, rows.shape[1], num_queries * dim))
        summed, normed = next_norm.after_sum(rows, out)
        result = summed.add_(mlp(normed))
        return result

    return forward


def _flat(turns: Any) -> tuple[Any, Any]:
    return turns[0].view(-1).numpy(), turns[1].view(-1).numpy()


def _is_plain(rows: Tensor, turns: Any, dim: int, options: Mapping[str, Any]) -> bool:
    """Whether a call is like those of `run_packed`: no mask, no cache, all of a head turned."""
    if not isinstance(turns, tuple) or len(turns) != 2 or rows.dim() != 3 or len(rows) != 1:
        return False
    shape = (1, rows.shape[1], dim)
    return (
        all(part.shape == shape and part.is_contiguous() for part in turns)
        and turns[0].dtype is turns[1].dtype is rows.dtype is torch.float32
        and not any(
            value is not None and name not in _WITHOUT_EFFECT
            for name, value in options.items()
            if name != "position_embeddings"
        )
    )
