"""A checkpoint's tensors under the names that the model's modules have for them.

The library renames tensors of some families when it loads them, and merges experts. Its own rules
are asked, so that what is loaded here is what it would load.
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdserve.engine.library_model import check_loaded
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.sharding.sources import (
    Concatenated,
    InFile,
    InMemory,
    Source,
    Stacked,
    copy_cut,
)

Sources = Mapping[str, Source]


def read_sources(files: ModelFiles, whole: Any) -> Sources:
    """Where each tensor of `whole` is; reads headers only.

    `whole` is the library's model of all layers, of which shapes and names are used. `LocalFault`
    if the files lack a tensor, have one of another shape, or one that a layer does not use.
    """
    found, unexpected = _named_by_module(_in_files(files), whole)
    wanted = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    tied = whole.all_tied_weights_keys
    sources = dict(found)
    for target, source in tied.items():
        for one, other in ((target, source), (source, target)):
            if one in wanted and one not in found and other in found:
                sources[one] = found[other]
    missing = {
        name
        for name in wanted
        if name not in sources and not _is_among(name, whole, "_keys_to_ignore_on_load_missing")
    }
    mismatched = {
        (name, source.shape, wanted[name])
        for name, source in sources.items()
        if source.shape != wanted[name]
    }
    loading = {
        "missing_keys": missing,
        "mismatched_keys": mismatched,
        "unexpected_keys": {
            name
            for name in unexpected
            if not _is_among(name, whole, "_keys_to_ignore_on_load_unexpected")
        },
    }
    check_loaded(files, whole, loading)
    return sources


def _is_among(name: str, whole: Any, rule: str) -> bool:
    """Whether the model's class says that it does without the tensor."""
    return any(re.search(pattern, name) for pattern in getattr(whole, rule, None) or ())


def _in_files(files: ModelFiles) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for path in files.weights:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = InFile(Path(path), name, tuple(entry["shape"]))
    return found


def _named_by_module(given: Mapping[str, Source], whole: Any) -> tuple[dict[str, Source], set[str]]:
    """By the model's names; and names that the model has no use for."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(whole)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted, prefix = whole.state_dict(), whole.base_model_prefix
    found: dict[str, Source] = {}
    unexpected: set[str] = set()
    merges: dict[str, _Merge] = {}
    for name in sorted(given, key=dot_natural_key):
        own, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if own not in wanted and name in wanted:
            own, pattern = rename_source_key(name, [], [], prefix, wanted)
        if own not in wanted:
            unexpected.add(own)
        elif pattern is None:
            found[own] = given[name]
        else:
            merge = merges.setdefault(own, _Merge(by_pattern[pattern], whole, own))
            merge.parts[pattern].append((name, given[name]))
    for merge in merges.values():
        found |= merge.results()
    return found, unexpected


class _Merge:
    """What the library makes of some tensors: one, or several."""

    def __init__(self, rule: Any, whole: Any, name: str) -> None:
        self.rule = rule
        self.name = name
        self.parts: dict[str, list[tuple[str, Source]]] = defaultdict(list)
        self._whole = whole

    def results(self) -> dict[str, Source]:
        """By name. Plain stacks and rows stay apart until a part of them is copied."""
        simple = self._as_one()
        if simple is not None:
            return {self.name: simple}
        made = self.converted(is_meta=True)
        return {name: _Result(self, name, tuple(value.shape)) for name, value in made.items()}

    def _as_one(self) -> Source | None:
        named = {pattern: [each for _, each in parts] for pattern, parts in self.parts.items()}
        if len(self.rule.target_patterns) != 1:
            return None
        for operation in self.rule.operations:
            kind = type(operation).__name__
            if kind == "MergeModulelist" and operation.dim == 0:
                named = {pattern: [Stacked(parts)] for pattern, parts in named.items()}
            elif kind == "Concatenate":
                order = [named[key] for key in self.rule.source_patterns if key in named]
                every = [part for parts in order for part in parts]
                named = {"": [Concatenated(every, operation.dim)]}
            else:
                return None
        [parts] = named.values() if len(named) == 1 else [[]]
        return parts[0] if len(parts) == 1 else None

    def converted(self, is_meta: bool = False) -> dict[str, Tensor]:
        """By the library's own operations, from whole tensors."""
        rule = copy.deepcopy(self.rule)
        for pattern, parts in self.parts.items():
            for name, source in parts:
                value = torch.empty(source.shape, device="meta" if is_meta else "cpu")
                if not is_meta:
                    copy_cut(source, value, None)
                rule.add_tensor(self.name, name, pattern, value)
        made = rule.convert(self.name, model=self._whole, config=self._whole.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


@dataclass(frozen=True, slots=True)
class _Result:
    """One of the tensors that the library's operations make."""

    merge: _Merge
    name: str
    shape: tuple[int, ...]

    def copy_into(self, out: Tensor, dim: int, start: int, end: int) -> None:
        InMemory(self.merge.converted()[self.name]).copy_into(out, dim, start, end)
