"""Linear layers with weights laid out once, in the form that is the fastest on this machine."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from pdserve.engine.matrix_forms import Choice, Forward, WeightShape, choose_forms

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_JOINABLE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def pack_linears(model: Module) -> int:
    """Give each `Linear` of `model` in the host's memory its fastest forward; returns how many.

    Modules keep their type and place; only their `forward` is replaced. A weight that nothing else
    uses gives up its memory if another form takes its place: what remains has its shape and dtype
    and is NaN everywhere, so that code which reads it past the module is found out by the check at
    load.
    """
    linears = [
        module
        for module in model.modules()
        if type(module) is Linear
        and module.weight.dtype in _DTYPES
        and module.weight.device.type == "cpu"
    ]
    users = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    groups = joinable(model, linears)
    alone = [linear for linear in linears if not any(linear in group for group in groups)]
    groups += [[linear] for linear in alone]
    choices = choose_forms(Counter(_shape(group) for group in groups))
    for group in groups:
        _replace(group, choices[_shape(group)], users)
    return len(linears)


def _shape(group: list[Linear]) -> WeightShape:
    """Of all weights of the group, one below the other."""
    first = group[0]
    out_features = sum(linear.out_features for linear in group)
    return WeightShape(out_features, first.in_features, first.weight.dtype)


def _replace(group: list[Linear], choice: Choice, users: Counter[int]) -> None:
    if len(group) == 1:
        forwards: list[Forward] = [choice.bind(group[0].weight, group[0].bias)]
    else:
        weight = torch.cat([linear.weight.detach() for linear in group])
        biases = [linear.bias.detach() for linear in group if linear.bias is not None]
        run = choice.bind(weight, torch.cat(biases) if biases else None)
        product = JoinedLinears(run, [linear.out_features for linear in group])
        forwards = [JoinedPart(product, place) for place in range(len(group))]
    for linear, forward in zip(group, forwards, strict=True):
        is_shared = users[id(linear.weight)] > 1
        replaced: Any = linear
        replaced.forward = forward
        if not is_shared and (len(group) > 1 or choice.form.is_copy):
            hollow = torch.full((1, 1), torch.nan, dtype=linear.weight.dtype)
            linear.weight = Parameter(hollow.expand(linear.weight.shape), requires_grad=False)


def joinable(model: Module, linears: list[Linear]) -> list[list[Linear]]:
    """Projections of the same rows among `linears`, which can be one product."""
    packed = set(linears)
    groups = []
    for module in model.modules():
        for names in _JOINABLE:
            parts = [module._modules.get(name) for name in names]
            found = [part for part in parts if isinstance(part, Linear) and part in packed]
            kinds = {(part.bias is None, part.in_features, part.weight.dtype) for part in found}
            if len(found) == len(parts) and len(kinds) == 1:
                packed -= set(found)
                groups.append(found)
    return groups


class JoinedLinears:
    """Several linear layers of the same rows as one product: `run` gives them side by side."""

    def __init__(self, run: Forward, sizes: list[int]) -> None:
        self.run, self.sizes = run, sizes
        self._rows: Tensor | None = None
        self._results: tuple[Tensor, ...] = ()

    def part(self, index: int, rows: Tensor) -> Tensor:
        """Layer `index` of `rows`, computed for all layers when one is asked for.

        The last layer lets go of rows and results.
        """
        if rows is not self._rows:
            self._rows, self._results = (
                rows,
                torch.split_with_sizes(self.run(rows), self.sizes, dim=-1),
            )
        result = self._results[index]
        if index == len(self.sizes) - 1:
            self._rows, self._results = None, ()
        return result


class JoinedPart:
    """The forward of one layer of a joined product."""

    def __init__(self, product: JoinedLinears, place: int) -> None:
        self.product = product
        self.place = place

    def __call__(self, rows: Tensor) -> Tensor:
        return self.product.part(self.place, rows)


def joined_by(linears: Sequence[Module | None]) -> JoinedLinears | None:
    """The product that is these layers in this order, if there is one."""
    parts = [vars(linear).get("forward") for linear in linears if linear is not None]
    products = {id(part.product): part.product for part in parts if isinstance(part, JoinedPart)}
    places = [part.place for part in parts if isinstance(part, JoinedPart)]
    product = next(iter(products.values()), None)
    if product is None or len(products) != 1 or places != list(range(len(linears))):
        return None
    return product if len(product.sizes) == len(linears) else None
