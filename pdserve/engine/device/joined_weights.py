"""Projections of the same rows as one product on a device: fewer launches, and larger ones.

q_proj [24, 16]  ┐
k_proj [ 8, 16]  ├─▶ one weight [40, 16]; those of the three are views of it
v_proj [ 8, 16]  ┘
"""

from collections import Counter
from typing import Any

import torch
from torch.nn import Linear, Module, Parameter

from pdserve.engine.packed_linear import JoinedLinears, JoinedPart, joinable


@torch.inference_mode()
def join_linears(model: Module) -> int:
    """Join the projections of each module that there are together; returns how many products.

    Modules keep their type, and their weights what they hold; only `forward` is replaced. No more
    memory is taken in the end: each group's own is given up before the next one is joined. A weight
    that something else uses, too, stays as it is.
    """
    users = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    linears = [
        module
        for module in model.modules()
        if type(module) is Linear and users[id(module.weight)] == 1
    ]
    groups = joinable(model, linears)
    for group in groups:
        _join(group)
    return len(groups)


def _join(group: list[Linear]) -> None:
    sizes = [linear.out_features for linear in group]
    weight = torch.cat([linear.weight.detach() for linear in group])
    biases = [linear.bias.detach() for linear in group if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    linear_of: Any = torch.nn.functional.linear
    product = JoinedLinears(lambda rows: linear_of(rows, weight, bias), sizes)
    for place, (linear, part) in enumerate(zip(group, torch.split(weight, sizes), strict=True)):
        replaced: Any = linear
        replaced.forward = JoinedPart(product, place)
        linear.weight = Parameter(part, requires_grad=False)
        if bias is not None:
            linear.bias = Parameter(torch.split(bias, sizes)[place], requires_grad=False)
