"""Stages of a model: each rank has the modules of its own layers, and stand-ins for the others.

The library's forward runs as ever. The stand-in before the first own layer gives what the stage
before has sent, whatever comes in; the one after the last own layer sends what comes in.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from pdserve.domain.errors import LocalFault
from pdserve.engine.rank_group import RankGroup

_PLAIN = (str, int, bool, float)


def layer_list(model: Any) -> ModuleList:
    """The decoder layers of a model of the library; `LocalFault` if they cannot be told."""
    num_layers = model.config.get_text_config().num_hidden_layers
    found = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise LocalFault(
            f"model type {model.config.model_type} cannot be divided by layers: it has no list of "
            f"its {num_layers} layers; one rank can serve it"
        )
    return min(found, key=lambda each: each[0])[1]


class _OtherLayer(Module):
    """Stands for a layer of another stage, whose plain attributes it has."""

    def __init__(self, layer: Module, gives_tuple: bool) -> None:
        super().__init__()
        self.gives_tuple = gives_tuple
        for name, value in vars(layer).items():
            if isinstance(value, _PLAIN) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        hidden = self.passed(hidden)
        return (hidden,) if self.gives_tuple else hidden

    def passed(self, hidden: Tensor) -> Tensor:
        return hidden


class _Received(_OtherLayer):
    """Gives the rows of the stage before: [1, rows, hidden size], in the model's dtype."""

    def __init__(
        self,
        layer: Module,
        gives_tuple: bool,
        group: RankGroup,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(layer, gives_tuple)
        self.group = group
        self.hidden_size = hidden_size
        self.dtype = dtype

    def passed(self, hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], self.hidden_size)
        return self.group.receive(hidden.new_empty(shape, dtype=self.dtype))


class _Sent(_OtherLayer):
    """Sends the rows to the stage after."""

    def __init__(
        self, layer: Module, gives_tuple: bool, group: RankGroup, dtype: torch.dtype
    ) -> None:
        super().__init__(layer, gives_tuple)
        self.group = group
        self.dtype = dtype

    def passed(self, hidden: Tensor) -> Tensor:
        if hidden.dtype is not self.dtype:
            raise LocalFault(f"a layer gives {hidden.dtype} in a model of {self.dtype}")
        self.group.send(hidden.contiguous())
        return hidden


class _NoTable(Module):
    """Stands for the embedding or the output layer of another stage: zeros of `width`."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("weight", torch.zeros(0, width, dtype=dtype), persistent=False)
        self.bias: Parameter | None = None

    def forward(self, rows: Tensor, *_: Any, **__: Any) -> Tensor:
        weight: Any = self.weight
        shape = rows.shape if not rows.is_floating_point() else rows.shape[:-1]
        return torch.zeros((*shape, self.width), dtype=weight.dtype, device=rows.device)


def keep_stage(model: Any, layers: range, group: RankGroup, gives_tuple: bool) -> None:
    """Leave `model` with the modules of `layers`, and of embedding and head if they are its own."""
    every = layer_list(model)
    sizes, dtype = model.config.get_text_config(), model.get_input_embeddings().weight.dtype
    for index, layer in enumerate(every):
        if index in layers:
            continue
        if index == layers.start - 1:
            every[index] = _Received(layer, gives_tuple, group, sizes.hidden_size, dtype)
        elif index == layers.stop:
            every[index] = _Sent(layer, gives_tuple, group, dtype)
        else:
            every[index] = _OtherLayer(layer, gives_tuple)
    if layers.start > 0:
        width = model.get_input_embeddings().weight.shape[1]
        model.set_input_embeddings(_NoTable(width, dtype))
    if layers.stop < len(every):
        model.set_output_embeddings(_NoTable(1, dtype))
