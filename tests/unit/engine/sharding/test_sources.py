"""Parts of tensors in files are what torch makes of the whole ones."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pdserve.engine.sharding.cutting import Cut
from pdserve.engine.sharding.sources import (
    Concatenated,
    InFile,
    InMemory,
    Source,
    Stacked,
    copy_cut,
)


def read(source: Source, cut: Cut | None, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = list(source.shape)
    if cut:
        shape[cut.dim] = sum(end - start for start, end in cut.spans)
    out = torch.full(shape, torch.nan, dtype=dtype)
    copy_cut(source, out, cut)
    return out


def part(whole: Tensor, cut: Cut | None) -> Tensor:
    if cut is None:
        return whole
    return torch.cat(
        [whole.narrow(cut.dim, start, end - start) for start, end in cut.spans], dim=cut.dim
    )


def some_cuts(shape: tuple[int, ...], chooser: random.Random) -> list[Cut | None]:
    found: list[Cut | None] = [None]
    for dim, size in enumerate(shape):
        for _ in range(4):
            ends = sorted(chooser.choices(range(size + 1), k=4))
            found.append(Cut(dim=dim, spans=((ends[0], ends[1]), (ends[2], ends[3]))))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_any_part_of_files_stacks_and_rows_is_that_of_the_whole(seed: int, tmp_path: Path) -> None:
    chooser, path = random.Random(seed), tmp_path / "some.safetensors"
    tensors = {f"{kind}.{index}": torch.randn(5, 6) for kind in "ab" for index in range(3)}
    save_file(tensors, path)
    one, other = (
        Stacked([InFile(path, f"{kind}.{index}", (5, 6)) for index in range(3)]) for kind in "ab"
    )
    wholes = [torch.stack([tensors[f"{kind}.{index}"] for index in range(3)]) for kind in "ab"]
    for along in (0, 1, 2):
        source, whole = Concatenated([one, other], along), torch.cat(wholes, dim=along)
        assert source.shape == whole.shape
        for cut in some_cuts(source.shape, chooser):
            assert torch.equal(read(source, cut), part(whole, cut)), (seed, cut)


def test_parts_take_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(12.0).view(3, 4), "scale": torch.tensor(2.5)}, path)
    cut = Cut(dim=1, spans=((1, 3),))
    found = read(InFile(path, "a", (3, 4)), cut, torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert found.tolist() == [[1, 2], [5, 6], [9, 10]]
    assert float(read(InFile(path, "scale", ()), None)) == 2.5
    assert float(read(InMemory(torch.tensor(2.5)), None)) == 2.5
