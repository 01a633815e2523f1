"""A batch laid end to end: the arrays that a packed forward needs, and no padding.

sequences      A (chunk of 3)      B (decode)   C (chunk of 2)
rows           0    1    2         3            4    5
positions      13   14   15        40           0    1
firsts         0                   3            4
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from pdserve.domain.invariants import check_invariant
from pdserve.engine.contract import StepBatch

Ints = npt.NDArray[np.int64]
NO_SOURCE = -1
"""Of a row whose token the host knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Rows are tokens; s counts sequences."""

    token_ids: Ints  # [rows]
    sources: Ints  # [rows], the place of the draw that each follows, or `NO_SOURCE`
    positions: Ints  # [rows]
    firsts: Ints  # [s], first row of each sequence
    lengths: Ints  # [s], its rows
    starts: Ints  # [s], position of its first row: tokens already in the cache
    tables: Ints  # all block tables, one after the other
    table_firsts: Ints  # [s], where each begins in `tables`
    row_blocks: Ints  # [rows], the block where the row's K and V go
    row_offsets: Ints  # [rows], and the place in it
    sampled_rows: Ints  # rows whose logits are wanted, in sequence order

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


def pack(batch: StepBatch, block_size: int) -> PackedBatch:
    """Flatten `batch`. A block table must cover its sequence's last position."""
    sequences = batch.sequences
    lengths = np.array([len(each.token_ids) for each in sequences], dtype=np.int64)
    starts = np.array([each.start for each in sequences], dtype=np.int64)
    table_sizes = np.array([len(each.block_table) for each in sequences], dtype=np.int64)
    check_invariant(bool((lengths > 0).all()), "a sequence has tokens", lengths)
    are_covered = bool((table_sizes * block_size >= starts + lengths).all())
    check_invariant(are_covered, "a block table covers its sequence", table_sizes, starts, lengths)
    firsts, table_firsts = np.cumsum(lengths) - lengths, np.cumsum(table_sizes) - table_sizes
    tables = _flat([each.block_table for each in sequences], int(table_sizes.sum()))
    num_rows = int(lengths.sum())
    positions = np.arange(num_rows) + np.repeat(starts - firsts, lengths)
    row_blocks = tables[np.repeat(table_firsts, lengths) + positions // block_size]
    sources = np.full(num_rows, NO_SOURCE, dtype=np.int64)
    followed = [NO_SOURCE if each.follows is None else each.follows for each in sequences]
    if any(each != NO_SOURCE for each in followed):
        sources[firsts] = followed
        is_one_token = bool((lengths[sources[firsts] != NO_SOURCE] == 1).all())
        check_invariant(is_one_token, "a sequence follows with one token", followed, lengths)
    sampling = np.array([each.sample is not None for each in sequences], dtype=np.bool_)
    return PackedBatch(
        token_ids=_flat([each.token_ids for each in sequences], num_rows),
        sources=sources,
        positions=positions,
        firsts=firsts,
        lengths=lengths,
        starts=starts,
        tables=tables,
        table_firsts=table_firsts,
        row_blocks=row_blocks,
        row_offsets=positions % block_size,
        sampled_rows=(firsts + lengths - 1)[sampling],
    )


def _flat(parts: list[tuple[int, ...]], size: int) -> Ints:
    return np.fromiter(chain.from_iterable(parts), dtype=np.int64, count=size)
