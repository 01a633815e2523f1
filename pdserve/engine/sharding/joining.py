"""Modules that ranks of a stage compute together: each a part, and all of them have the result."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sharding.cutting import Cut, leaf_of


class Joined(Module):
    """Stands in for `inner`, whose attributes it has too."""

    inner: Module

    def __init__(self, inner: Module, group: RankGroup) -> None:
        super().__init__()
        self.inner = inner
        self.group = group

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)


class Summed(Joined):
    """A layer of which each rank has some of the inputs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of results that are several, the first is the sum."""
        result = self.inner(*args, **kwargs)
        if isinstance(result, tuple):
            return (self.group.all_reduce(result[0]), *result[1:])
        return self.group.all_reduce(result)


class GatheredNorm(Joined):
    """A normalisation over more values than a rank has of a row: `inner` has the whole weight.

    If KV heads are fewer than ranks, `copies` ranks after one another have the same values.
    """

    def __init__(self, inner: Module, group: RankGroup, size: int, copies: int) -> None:
        super().__init__(inner, group)
        self._size = size
        self._copies = copies

    def forward(self, rows: Tensor) -> Tensor:
        gathered = self.group.all_gather(rows.contiguous())
        parts = torch.split_with_sizes(gathered, [self._size] * self.group.place.tp, dim=-1)
        place = self.group.place.shard // self._copies * self._size
        whole: Tensor = self.inner(torch.cat(parts[:: self._copies], dim=-1))
        return whole.narrow(-1, place, self._size)


def needs_sum(module: Module, cuts: dict[str, Cut]) -> bool:
    """Whether `module` adds over something that the ranks have parts of; `cuts` by parameter."""
    if type(module).__name__ == "Conv1D":
        return "weight" in cuts and cuts["weight"].dim == 0
    if isinstance(module, torch.nn.Linear):
        return "weight" in cuts and cuts["weight"].dim == 1
    return "down_proj" in cuts


def added_once(module: Module) -> list[Parameter]:
    """Biases of a module that is summed: one rank alone may add them."""
    return [
        parameter
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or (name.endswith("_bias") and leaf_of(name).startswith("down_proj"))
    ]


def is_wide_norm(module: Module, cuts: dict[str, Cut]) -> bool:
    """Whether `module` normalises over values that the ranks have parts of."""
    weight = getattr(module, "weight", None)
    is_norm = "Norm" in type(module).__name__ and isinstance(weight, Tensor)
    return is_norm and "weight" in cuts and weight is not None and weight.dim() == 1


def norm_size(norm: Module) -> int:
    """Of how many values a norm has weights."""
    weight: Any = norm.weight
    return int(weight.shape[0])


def set_norm_size(norm: Any, size: int) -> None:
    """Have a norm's own checks agree with its weight."""
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (size,)
