"""Plans of attention: what kernels read is what the batch says."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from pdserve.domain.ids import BlockId
from pdserve.domain.invariants import BrokenInvariant
from pdserve.engine.contract import SequenceStep, StepBatch
from pdserve.engine.device.plan import (
    PADDING,
    AttentionPlan,
    PlanShape,
    table_width,
    write_plan,
)
from pdserve.engine.packing import PackedBatch, pack

BLOCK_SIZE = 4


def batch_of(*spans: tuple[int, int], spare_blocks: int = 0) -> PackedBatch:
    """Spans are (start, rows); sequence n has blocks 100 n, 100 n + 1, ..."""
    steps = []
    for place, (start, rows) in enumerate(spans):
        size = -(-(start + rows) // BLOCK_SIZE) + spare_blocks
        table = tuple(BlockId(100 * place + index) for index in range(size))
        steps.append(SequenceStep(token_ids=(0,) * rows, start=start, block_table=table))
    return pack(StepBatch(tuple(steps)), BLOCK_SIZE)


def written(batch: PackedBatch, shape: PlanShape) -> dict[str, Any]:
    memory = np.full(shape.num_values, 77, dtype=np.int32)
    write_plan(batch, shape, memory, BLOCK_SIZE)
    plan = AttentionPlan.over(torch.from_numpy(memory), shape)
    return {name: getattr(plan, name).tolist() for name in AttentionPlan.__dataclass_fields__}


def test_chunks_are_cut_into_tiles_and_the_rest_is_padding() -> None:
    shape = PlanShape(rows=8, sequences=3, width=3, tiles=5, rows_per_tile=4)
    assert written(batch_of((3, 5), (6, 1)), shape) == {
        "row_blocks": [0, 1, 1, 1, 1, 101, PADDING, PADDING],
        "row_offsets": [3, 0, 1, 2, 3, 2, 0, 0],
        "tables": [[0, 1, 0], [100, 101, 0], [0, 0, 0]],
        "firsts": [0, 5, 0],
        "starts": [3, 6, 0],
        "tile_sequence": [0, 0, 1, 0, 0],
        "tile_row": [0, 4, 5, 0, 0],
        "tile_rows": [4, 1, 1, 0, 0],
    }


def test_decode_has_a_tile_for_each_row() -> None:
    plan = written(batch_of((3, 1), (6, 1)), PlanShape.decode(3, width=2))
    assert plan["tile_row"] == [0, 1, 0]
    assert plan["tile_rows"] == [1, 1, 0]
    assert plan["row_blocks"] == [0, 101, PADDING]


def test_blocks_that_are_reserved_but_empty_take_no_width() -> None:
    batch = batch_of((3, 5), (6, 1), spare_blocks=50)
    assert table_width(batch, BLOCK_SIZE) == 2
    assert written(batch, PlanShape.of(batch, width=2, rows_per_tile=4))["tables"] == [
        [0, 1],
        [100, 101],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_tile_of_its_sequence(seed: int) -> None:
    chance = random.Random(seed)
    spans = [(chance.randrange(20), chance.randint(1, 12)) for _ in range(chance.randint(1, 6))]
    rows_per_tile = chance.choice([1, 2, 4, 8])
    batch = batch_of(*spans)
    shape = PlanShape.of(batch, width=table_width(batch, BLOCK_SIZE), rows_per_tile=rows_per_tile)
    plan = written(batch, shape)
    owners = np.repeat(np.arange(len(spans)), batch.lengths).tolist()
    tiles = zip(plan["tile_sequence"], plan["tile_row"], plan["tile_rows"], strict=True)
    seen = [(row, owner) for owner, first, rows in tiles for row in range(first, first + rows)]
    assert seen == list(enumerate(owners)), (seed, spans)
    assert max(plan["tile_rows"]) <= rows_per_tile


@pytest.mark.parametrize("field", ["rows", "sequences", "width", "tiles"])
def test_a_plan_without_room_for_its_batch_is_refused(field: str) -> None:
    sizes = {"rows": 6, "sequences": 2, "width": 2, "tiles": 3, "rows_per_tile": 4}
    batch = batch_of((3, 5), (6, 1))
    written(batch, PlanShape(**sizes))
    with pytest.raises(BrokenInvariant, match="room"):
        written(batch, PlanShape(**{**sizes, field: sizes[field] - 1}))
