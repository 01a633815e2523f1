"""Where a model's tensors come from: parts of them are copied, and no more than that is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pdserve.engine.sharding.cutting import Cut


class Source(Protocol):
    """A tensor that may lie in files, in one or many."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def copy_into(self, out: Tensor, dim: int, start: int, end: int) -> None:
        """Fill `out` with the values from `start` to `end` of dimension `dim`, in its own dtype."""
        ...


def copy_cut(source: Source, out: Tensor, cut: Cut | None) -> None:
    """Fill `out`, which has the size of the part, with the part of `source` that `cut` names."""
    if not source.shape:
        source.copy_into(out, 0, 0, 1)
        return
    dim, spans = (cut.dim, cut.spans) if cut else (0, ((0, source.shape[0]),))
    at = 0
    for start, end in spans:
        source.copy_into(out.narrow(dim, at, end - start), dim, start, end)
        at += end - start


@dataclass(frozen=True, slots=True)
class InMemory:
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def copy_into(self, out: Tensor, dim: int, start: int, end: int) -> None:
        out.copy_(self.tensor.narrow(dim, start, end - start) if self.shape else self.tensor)


@dataclass(frozen=True, slots=True)
class InFile:
    """A tensor of a safetensors file, which is mapped only while a part is copied.

    Pages that were read count as this process's memory for as long as the file stays mapped.
    """

    path: Path
    name: str
    shape: tuple[int, ...]

    def copy_into(self, out: Tensor, dim: int, start: int, end: int) -> None:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            if not self.shape:
                out.copy_(file.get_tensor(self.name))
                return
            rest = (slice(None),) * dim
            out.copy_(file.get_slice(self.name)[(*rest, slice(start, end))])


@dataclass(frozen=True, slots=True)
class Stacked:
    """Tensors of one shape, side by side along a new first dimension."""

    parts: Sequence[Source]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def copy_into(self, out: Tensor, dim: int, start: int, end: int) -> None:
        if dim == 0:
            for row, part in zip(out, self.parts[start:end], strict=True):
                copy_cut(part, row, None)
            return
        for row, part in zip(out, self.parts, strict=True):
            part.copy_into(row, dim - 1, start, end)


@dataclass(frozen=True, slots=True)
class Concatenated:
    """Tensors after one another along dimension `along`."""

    parts: Sequence[Source]
    along: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        total = sum(part.shape[self.along] for part in self.parts)
        return (*first[: self.along], total, *first[self.along + 1 :])

    def copy_into(self, out: Tensor, dim: int, start: int, end: int) -> None:
        at = filled = 0
        for part in self.parts:
            size = part.shape[self.along]
            if dim != self.along:
                part.copy_into(out.narrow(self.along, at, size), dim, start, end)
            else:
                first, last = max(start, at) - at, min(end, at + size) - at
                if first < last:
                    part.copy_into(out.narrow(dim, filled, last - first), dim, first, last)
                    filled += last - first
            at += size
