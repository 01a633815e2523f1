"""The gated feed-forward layer of most families in three steps: product, SiLU times, product."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module

from pdserve.engine.numba_rows import compile_rows
from pdserve.engine.packed_linear import JoinedLinears, joined_by

Forward = Callable[[Tensor], Tensor]


@torch.inference_mode()
def fuse_mlps(model: Module) -> int:
    """Give each module that is down(silu(gate(x)) * up(x)) that forward; returns how many.

    Call it after `pack_linears`. Names of parts say little of what is done with them, so each
    module is tried on random rows, and left alone unless the results are equal to rounding.
    """
    return replace_forwards(model, _fused_forward)


def replace_forwards(model: Module, fused: Callable[[Module], Forward | None]) -> int:
    """Give each module of `model` the forward that `fused` has for it; returns how many."""
    num_fused = 0
    for module in model.modules():
        if (forward := fused(module)) is not None:
            replaced: Any = module
            replaced.forward = forward
            num_fused += 1
    return num_fused


def _fused_forward(module: Module) -> Callable[[Tensor], Tensor] | None:
    gate, up, down = (module._modules.get(f"{name}_proj") for name in ("gate", "up", "down"))
    if not isinstance(gate, Linear) or not isinstance(up, Linear) or down is None:
        return None
    product = joined_by([gate, up])
    if product is None or gate.out_features != up.out_features:
        return None
    if gate.weight.dtype is not torch.float32:
        return None
    forward = _gated(product, down.forward)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 5, gate.in_features, generator=generator)
    try:
        expected = module(rows)
    except Exception:  # noqa: BLE001 - any model code: a forward that wants more than rows
        return None
    return forward if is_same(forward(rows), expected) else None


def is_same(result: Tensor, expected: Any) -> bool:
    """Whether they differ by rounding at the most."""
    if not isinstance(expected, Tensor) or expected.shape != result.shape:
        return False
    scale = result.abs().max().clamp_min(1)
    return torch.allclose(result / scale, expected / scale, rtol=1e-6, atol=1e-6)


def _gated(product: JoinedLinears, down: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    run, width, silu_times = product.run, product.sizes[0], compile_rows().silu_times

    def forward(rows: Tensor) -> Tensor:
        joined = run(rows)
        out = joined.new_empty((*joined.shape[:-1], width))
        silu_times(joined.view(-1).numpy(), width, out.view(-1).numpy())
        return down(out)

    return forward
