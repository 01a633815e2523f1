"""The rotary embedding of query and key in one pass each where the library's code takes ten.

The library's attention modules call a function of their file, `apply_rotary_pos_emb`. A module
whose function is the common one (rotate the halves) gets its own copy of its forward that calls
ours instead; the file and all other modules stay as they are.
"""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pdserve.engine.numba_rows import compile_rows

_NAME = "apply_rotary_pos_emb"
_Rotary = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def fuse_rotary(model: Module) -> int:
    """Replace the rotary embedding of each float32 module where a trial gives the same rows."""
    rotaries: dict[Any, _Rotary | None] = {}
    num_fused = 0
    for module in model.modules():
        forward = getattr(type(module), "forward", None)
        if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
            continue
        if hasattr(forward, "__wrapped__") or "forward" in vars(module):
            continue
        plain = forward.__globals__.get(_NAME)
        if plain not in rotaries:
            rotaries[plain] = _fused(plain) if callable(plain) else None
        rotary = rotaries[plain]
        if rotary is not None:
            replaced: Any = module
            replaced.forward = MethodType(_calling(forward, rotary), module)
            num_fused += 1
    return num_fused


def _calling(forward: FunctionType, rotary: _Rotary) -> FunctionType:
    """A copy of `forward` that finds `rotary` under the library's name."""
    names = {**forward.__globals__, _NAME: rotary}
    copy = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _fused(plain: _Rotary) -> _Rotary | None:
    """Ours, if it does the same as `plain` to random rows."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 5, heads, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    rotary = _rotary(plain)
    arguments = (query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    try:
        expected = plain(*arguments)
    except Exception:  # noqa: BLE001 - any model code: a function of other arguments
        return None
    for result, right in zip(rotary(*arguments), expected, strict=True):
        if result.shape != right.shape or not torch.allclose(result, right, rtol=1e-6, atol=1e-6):
            return None
    return rotary


def _rotary(plain: _Rotary) -> _Rotary:
    run = compile_rows().rotate

    def rotate(part: Tensor, cosines: Any, sines: Any) -> Tensor:
        _, heads, rows, dim = part.shape
        stride = part.stride(2)
        out = part.new_empty(1, rows, heads, dim)
        flat = part.as_strided(((rows - 1) * stride + heads * dim,), (1,))
        run(flat.numpy(), stride, heads, cosines, sines, dim, out.view(-1).numpy())
        return out.transpose(1, 2)

    def apply(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        is_ours = not others and not options and cos.is_contiguous() and sin.is_contiguous()
        if not (is_ours and _fits(query, cos) and _fits(key, cos) and sin.shape == cos.shape):
            return plain(query, key, cos, sin, *others, **options)
        cosines, sines = cos.view(-1).numpy(), sin.view(-1).numpy()
        if _is_beside(query, key):
            shape = (1, query.shape[1] + key.shape[1], *query.shape[2:])
            both = rotate(query.as_strided(shape, query.stride()), cosines, sines)
            return both[:, : query.shape[1]], both[:, query.shape[1] :]
        return rotate(query, cosines, sines), rotate(key, cosines, sines)

    return apply


def _is_beside(query: Tensor, key: Tensor) -> bool:
    """Each row's key follows its query in memory, as a joined projection leaves them."""
    width = query.shape[1] * query.shape[3]
    return (
        query.stride() == key.stride()
        and query.stride(2) >= width + key.shape[1] * key.shape[3]
        and query.data_ptr() + width * query.element_size() == key.data_ptr()
        and query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    )


def _fits(part: Tensor, cos: Tensor) -> bool:
    """[1, heads, rows, dim] in memory as [rows, heads, dim] at any row stride, all dims turned."""
    _, heads, rows, dim = part.shape
    return (
        part.dtype is cos.dtype is torch.float32
        and cos.shape == (1, rows, dim)
        and part.shape[0] == 1
        and part.stride()[1::2] == (dim, 1)
        and part.stride(2) >= heads * dim
    )
