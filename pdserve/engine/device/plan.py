"""What a step's attention has to know of its batch, as one piece of memory.

    sequences        A (chunk of 5)    B (decode)   padding
    rows             0  1  2  3  4     5            6  7
    tiles of 4 rows  0           1     2            3  4 (empty)

Needs no torch: the arrays are written where the caller wants them (pinned memory), copied to the
device in one piece, and viewed there.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pdserve.domain.invariants import check_invariant
from pdserve.engine.packing import PackedBatch

if TYPE_CHECKING:
    from torch import Tensor

Ints32 = npt.NDArray[np.int32]
PADDING = -1  # the block of a row that stands for none


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """int32 tensors on the device that attends; padded to a `PlanShape`.

    `tables` holds each sequence's blocks, then zeros. A padded row has block -1 and is in no tile:
    its K and V are not stored, and its attention is zeros. A padded tile has no rows.
    """

    row_blocks: "Tensor"  # [rows], the block where the row's K and V go
    row_offsets: "Tensor"  # [rows], and the place in it
    tables: "Tensor"  # [sequences, width]
    firsts: "Tensor"  # [sequences], the first row of each
    starts: "Tensor"  # [sequences], and its position
    tile_sequence: "Tensor"  # [tiles]
    tile_row: "Tensor"  # [tiles], the first row of each
    tile_rows: "Tensor"  # [tiles], how many rows it has

    @classmethod
    def over(cls, memory: "Tensor", shape: "PlanShape") -> "AttentionPlan":
        """View what `write_plan` wrote: int32 [shape.num_values]."""
        return cls(**shape.views(memory))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanShape:
    """Sizes of a plan's arrays. Batches of one shape can be replayed as one recorded step."""

    rows: int
    sequences: int
    width: int  # blocks of the longest table
    tiles: int
    rows_per_tile: int = 1

    @classmethod
    def of(cls, batch: PackedBatch, *, width: int, rows_per_tile: int) -> "PlanShape":
        """Without padding, but for tables of `width` blocks (see `table_width`)."""
        return cls(
            rows=batch.num_rows,
            sequences=len(batch.lengths),
            width=width,
            tiles=int((-(-batch.lengths // rows_per_tile)).sum()),
            rows_per_tile=rows_per_tile,
        )

    @classmethod
    def decode(cls, num_rows: int, *, width: int) -> "PlanShape":
        """Of `num_rows` sequences of one row each, padded ones included."""
        return cls(rows=num_rows, sequences=num_rows, width=width, tiles=num_rows)

    @property
    def num_values(self) -> int:
        return 2 * self.rows + (self.width + 2) * self.sequences + 3 * self.tiles

    def views(self, memory: Any) -> dict[str, Any]:
        """Cut `memory` (array or tensor of `num_values`) into the arrays of a plan, by name."""
        sizes = [self.rows] * 2 + [self.sequences * self.width] + [self.sequences] * 2
        sizes += [self.tiles] * 3
        views, at = {}, 0
        for field, size in zip(fields(AttentionPlan), sizes, strict=True):
            views[field.name] = memory[at : at + size]
            at += size
        views["tables"] = views["tables"].reshape(self.sequences, self.width)
        return views


def table_width(batch: PackedBatch, block_size: int) -> int:
    """How many blocks the longest of the sequences has filled after this step."""
    return int(_table_sizes(batch, block_size).max())


def _table_sizes(batch: PackedBatch, block_size: int) -> npt.NDArray[np.int64]:
    """Blocks in use; a table can hold more, which are reserved for the answer."""
    sizes: npt.NDArray[np.int64] = -(-(batch.starts + batch.lengths) // block_size)
    return sizes


def write_plan(batch: PackedBatch, shape: PlanShape, memory: Ints32, block_size: int) -> None:
    """Write the plan of `batch` into `memory` (int32 [shape.num_values]), padding included.

    `shape` must have room for the batch: rows, sequences, the longest table, and tiles.
    """
    num_rows, num_sequences = batch.num_rows, len(batch.lengths)
    table_sizes = _table_sizes(batch, block_size)
    tiles = -(-batch.lengths // shape.rows_per_tile)
    num_tiles = int(tiles.sum())
    has_room = num_rows <= shape.rows and num_sequences <= shape.sequences
    has_room = has_room and num_tiles <= shape.tiles and int(table_sizes.max()) <= shape.width
    check_invariant(has_room, "a plan has room for its batch", shape, num_rows, table_sizes, tiles)
    views = shape.views(memory)
    memory[...] = 0
    views["row_blocks"][...] = PADDING
    views["row_blocks"][:num_rows] = batch.row_blocks
    views["row_offsets"][:num_rows] = batch.row_offsets
    views["firsts"][:num_sequences] = batch.firsts
    views["starts"][:num_sequences] = batch.starts
    sequences = np.repeat(np.arange(num_sequences), table_sizes)
    places = np.arange(len(sequences)) - (np.cumsum(table_sizes) - table_sizes)[sequences]
    views["tables"][sequences, places] = batch.tables[batch.table_firsts[sequences] + places]
    owners = np.repeat(np.arange(num_sequences), tiles)
    skipped = (np.arange(num_tiles) - (np.cumsum(tiles) - tiles)[owners]) * shape.rows_per_tile
    views["tile_sequence"][:num_tiles] = owners
    views["tile_row"][:num_tiles] = batch.firsts[owners] + skipped
    rest = batch.lengths[owners] - skipped
    views["tile_rows"][:num_tiles] = np.minimum(rest, shape.rows_per_tile)
