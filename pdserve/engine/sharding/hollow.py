"""What a model looks like, found out by running it without its weights.

Its linear layers answer with numbers of their own, whatever comes in, so that nothing is loaded and
nothing large is computed. Heads, head sizes and how positions are turned do not depend on weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, Parameter

from pdserve.domain.errors import LocalFault
from pdserve.domain.layout import LayerKv
from pdserve.domain.lengths import LengthRule
from pdserve.engine.length_probe import find_length_rule
from pdserve.engine.model_probe import discover_layout, use_paged
from pdserve.engine.sharding.stages import layer_list


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Of a whole model, as every rank of it finds it."""

    layers: tuple[LayerKv, ...]
    length_rule: LengthRule
    layers_give_tuples: bool


def find_shape(model: Any, limit: int) -> ModelShape:
    """Run `model`, whose weights need not be loaded and are gone afterwards.

    `LocalFault` if it cannot be served, as at the loading of a whole model. Requests have at most
    `limit` tokens.
    """
    _hollow_out(model)
    use_paged(model)
    kinds: list[bool] = []
    layer = layer_list(model)[0]
    handle = layer.register_forward_hook(
        lambda _module, _args, output: kinds.append(isinstance(output, tuple))
    )
    layout = discover_layout(model, block_size=1, dtype="float32")
    handle.remove()
    return ModelShape(
        layers=layout.layers,
        length_rule=find_length_rule(model, limit),
        layers_give_tuples=kinds[0],
    )


def find_layers(model: Any) -> tuple[LayerKv, ...] | None:
    """The KV of each layer of `model`, as above; None if its parts do not fit each other."""
    _hollow_out(model)
    use_paged(model)
    try:
        return discover_layout(model, block_size=1, dtype="float32").layers
    except LocalFault:
        return None


class _Answers:
    """Rows of fixed numbers, one for each width."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def row(self, width: int) -> Tensor:
        if width not in self._rows:
            generator = torch.Generator().manual_seed(width)
            self._rows[width] = torch.randn(width, generator=generator)
        return self._rows[width]


class _Hollow(Module):
    """Stands for a layer that makes rows, of other rows (of `num_inputs` values) or of tokens."""

    def __init__(self, row: Tensor, num_inputs: int | None = None) -> None:
        super().__init__()
        self.row = row
        self.num_inputs = num_inputs
        self.weight = Parameter(torch.empty(0, len(row)), requires_grad=False)
        self.bias: Parameter | None = None

    def forward(self, rows: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.num_inputs not in (None, rows.shape[-1]):
            raise ValueError(f"rows of {rows.shape[-1]} values; the layer takes {self.num_inputs}")
        shape = rows.shape if self.num_inputs is None else rows.shape[:-1]
        return self.row.expand(*shape, -1).clone()  # some models add to it in place


class _Experts(Module):
    """Stands for experts, whose results are as their rows."""

    def forward(self, rows: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(rows)


def _hollow_out(model: Any) -> None:
    answers = _Answers()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if (stand_in := _stand_in(module, answers)) is not None:
                parent._modules[name] = stand_in
    model.float()
    for parameter in model.parameters():
        parameter.data = torch.ones(parameter.shape)


def _stand_in(module: Module, answers: _Answers) -> Module | None:
    if type(module) is Linear:  # routers may be of a kind of their own, which does more
        return _Hollow(answers.row(module.out_features), module.in_features)
    if isinstance(module, Embedding):
        return _Hollow(answers.row(module.embedding_dim))
    if type(module).__name__ == "Conv1D":
        conv: Any = module
        return _Hollow(answers.row(conv.nf), conv.nx)
    if any(each.dim() > 2 for each in module.parameters(recurse=False)):
        return _Experts()
    return None
