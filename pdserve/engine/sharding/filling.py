"""Puts a rank's share of the weights into its modules, and joins the modules that are cut."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sharding.checkpoint import Sources
from pdserve.engine.sharding.cutting import Cut, Cutter, Shape
from pdserve.engine.sharding.joining import (
    GatheredNorm,
    Summed,
    added_once,
    is_wide_norm,
    needs_sum,
    norm_size,
    set_norm_size,
)
from pdserve.engine.sharding.sources import copy_cut
from pdserve.engine.sharding.vocabulary import (
    GatheredHead,
    ShardedEmbedding,
    shrink_embedding,
    vocabulary_cut,
    vocabulary_part,
)


@dataclass(slots=True, kw_only=True)
class Filling:
    """Of `model`, whose modules have the sizes of a shard and no weights yet."""

    model: Any
    cutter: Cutter
    shapes: Mapping[str, Shape]  # of the whole model's tensors
    sources: Sources
    group: RankGroup
    device: torch.device
    _shared: dict[tuple[int, Cut | None, torch.dtype], Tensor] = field(default_factory=dict)

    def run(self, dtype: torch.dtype) -> None:
        """Copy tensor by tensor. Those of one source (tied embeddings) stay one tensor."""
        stays_float = _stays_float(self.model, dtype)
        tables = {
            id(table): joined
            for table, joined in (
                (self.model.get_output_embeddings(), GatheredHead),
                (self.model.get_input_embeddings(), ShardedEmbedding),
            )
            if self.cutter.tp > 1 and table is not None
        }
        for name, module in list(self.model.named_modules()):
            if id(module) in tables:
                stand_in: Module | None = self._cut_table(name, module, tables[id(module)])
            else:
                stand_in = self._cut_module(name, module, stays_float)
            if stand_in is not None:
                parent, _, own = name.rpartition(".")
                self.model.get_submodule(parent)._modules[own] = stand_in
        self.model.to(self.device)

    def _cut_table(self, name: str, module: Module, joined: Any) -> Module | None:
        """Give an embedding or output layer the rows of the shard's tokens."""
        stored = list(_stored(name, module))
        if not stored:
            return None  # another stage's
        place = self.group.place
        vocab_size = self.shapes[stored[0][0]][0]
        cut = vocabulary_cut(vocab_size, place.shard, place.tp)
        num_rows = vocabulary_part(vocab_size, place.shard, place.tp)[2]
        for full_name, leaf, tensor in stored:
            self._fill(module, full_name, leaf, cut, (num_rows, *tensor.shape[1:]), tensor.dtype)
        shrink_embedding(module, num_rows)
        stand_in: Module = joined(module, self.group, vocab_size)
        return stand_in

    def _cut_module(
        self, name: str, module: Module, stays_float: Callable[[str], bool]
    ) -> Module | None:
        """Fill the tensors that `module` itself has; what is to stand in for it, if anything."""
        cuts: dict[str, Cut] = {}
        for full_name, leaf, tensor in _stored(name, module):
            cut = self.cutter.cut(full_name, self.shapes[full_name], tensor.shape)
            if cut is not None:
                cuts[leaf] = cut
        is_wide = is_wide_norm(module, cuts)
        own_size = norm_size(module) if is_wide else 0
        for full_name, leaf, tensor in list(_stored(name, module)):
            cut = None if is_wide else cuts.get(leaf)
            shape = self.shapes[full_name] if is_wide else tensor.shape
            dtype = torch.float32 if stays_float(full_name) else tensor.dtype
            self._fill(module, full_name, leaf, cut, shape, dtype)
        if is_wide:
            whole_size = norm_size(module)
            set_norm_size(module, whole_size)
            return GatheredNorm(
                module, self.group, own_size, self.cutter.tp * own_size // whole_size
            )
        if not needs_sum(module, cuts):
            return None
        if self.group.place.shard:
            for bias in added_once(module):
                bias.zero_()
        return Summed(module, self.group)

    def _fill(
        self,
        module: Module,
        full_name: str,
        leaf: str,
        cut: Cut | None,
        shape: Shape,
        dtype: torch.dtype,
    ) -> None:
        """Rows beyond the source's, which a vocabulary may leave, are zeros."""
        source = self.sources.get(full_name)
        if source is None:
            return  # the library computes it, and does not miss it in a checkpoint
        key = (id(source), cut, dtype)
        if key not in self._shared:
            value = torch.empty(tuple(shape), dtype=dtype, device=self.device)
            held = sum(end - start for start, end in cut.spans) if cut else 0
            if cut and held < shape[cut.dim]:
                value.zero_()
                copy_cut(source, value.narrow(cut.dim, 0, held), cut)
            else:
                copy_cut(source, value, cut)
            self._shared[key] = value
        value = self._shared[key]
        if leaf in module._parameters:
            module._parameters[leaf] = Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def _stored(name: str, module: Module) -> Iterator[tuple[str, str, Tensor]]:
    """Full name, own name and tensor of what a checkpoint has of `module` itself."""
    for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield (f"{name}.{leaf}" if name else leaf), leaf, tensor


def _stays_float(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether the library keeps a tensor in float32 whatever the model's dtype."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    pattern = build_glob_alternation(list(plan))[0]
    return lambda name: pattern.search(name) is not None
