"""Linear layers with weights laid out once for oneDNN.

`torch.nn.functional.linear` takes MKL for float32, which on AMD reaches less than half of what
oneDNN reaches (one core of an EPYC with AVX-512, 64 rows, 512 x 2816: 1.84 ms against 0.76 ms).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

_TYPICAL_ROWS = 64
_JOINABLE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def pack_linears(model: Module) -> int:
    """Pack each float32 `Linear` of `model` in place; returns how many.

    Modules keep their type and place; only their `forward` is replaced. A weight that nothing else
    uses gives up its memory: what remains has its shape and dtype and is NaN everywhere, so that
    code which reads it past the module is found out by the check at load.
    """
    onednn: Any = torch.backends.mkldnn
    if not onednn.is_available():
        return 0
    linears = [
        module
        for module in model.modules()
        if type(module) is Linear
        and module.weight.dtype is torch.float32
        and module.weight.device.type == "cpu"
    ]
    users = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    joined = _joined(model, linears)
    for linear in linears:
        is_shared = users[id(linear.weight)] > 1
        replaced: Any = linear
        replaced.forward = joined.get(linear) or _packed_forward(linear.weight, linear.bias)
        if not is_shared:
            hollow = torch.full((1, 1), torch.nan).expand(linear.weight.shape)
            linear.weight = Parameter(hollow, requires_grad=False)
    return len(linears)


def _joined(model: Module, linears: list[Linear]) -> dict[Linear, "JoinedPart"]:
    """Forwards of projections of the same rows that can be one product."""
    packed = set(linears)
    forwards: dict[Linear, JoinedPart] = {}
    for module in model.modules():
        for names in _JOINABLE:
            parts = [module._modules.get(name) for name in names]
            found = [part for part in parts if isinstance(part, Linear) and part in packed]
            biases = {part.bias is None for part in found}
            inputs = {part.in_features for part in found}
            if len(found) == len(parts) and len(biases) == len(inputs) == 1:
                product = JoinedLinears(found)
                forwards |= {part: JoinedPart(product, at) for at, part in enumerate(found)}
    return forwards


class JoinedLinears:
    """Several linear layers of the same rows as one product: `run` gives them side by side."""

    def __init__(self, linears: list[Linear]) -> None:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.run = _packed_forward(weight, torch.cat(biases) if biases else None)
        self.sizes = [linear.out_features for linear in linears]
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

    def __init__(self, product: JoinedLinears, index: int) -> None:
        self.product = product
        self._index = index

    def __call__(self, rows: Tensor) -> Tensor:
        return self.product.part(self._index, rows)


def _packed_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
    run: Any = torch.ops.mkldnn._linear_pointwise.default
    bias = None if bias is None else bias.detach()

    def forward(rows: Tensor) -> Tensor:
        result: Tensor = run(rows, packed, bias, "none", [], "")
        return result

    return forward
