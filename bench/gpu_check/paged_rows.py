"""Paged memory and decode plans of plain shapes, for parts that time the attention operator."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.gpu_check.machine import Machine
from pdserve.domain.ids import BlockId
from pdserve.engine.contract import SequenceStep, StepBatch
from pdserve.engine.device.op import paged_attention
from pdserve.engine.device.plan import AttentionPlan, PlanShape, table_width, write_plan
from pdserve.engine.packing import pack

BLOCK_SIZE = 16
ORDERS = ("nhd", "hnd", "heads", "apart")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Attention of a model: as many heads, KV heads, values of a head, and layers."""

    heads: int
    kv_heads: int
    dim: int
    num_layers: int
    dtype: torch.dtype

    def kv_bytes(self, num_positions: int) -> int:
        """K and V of one layer."""
        return 2 * num_positions * self.kv_heads * self.dim * self.dtype.itemsize

    def pair_flops(self, num_pairs: int) -> float:
        """Of `num_pairs` of a row and a position that it sees, in one layer."""
        return 4.0 * self.heads * self.dim * num_pairs


class PagedMemory:
    """K and V of all layers in random numbers, in one of several orders.

    nhd     a block is a piece: layer, K or V, place, head, as `KvLayout` has it
    hnd     layer, K or V, head, place
    heads   head, layer, K or V, place: the KV of any heads is one piece
    apart   a memory for each layer, as most engines have it: layer, K or V, block, place, head
    """

    def __init__(self, machine: Machine, shape: Shape, num_blocks: int, order: str = "nhd") -> None:
        layers, heads, dim = shape.num_layers, shape.kv_heads, shape.dim
        count = num_blocks * layers * 2 * BLOCK_SIZE * heads * dim
        flat = torch.empty(count, dtype=shape.dtype, device=machine.device).normal_()
        if order == "heads":
            sizes = (num_blocks, heads, layers, 2, BLOCK_SIZE, dim)
            view = flat.view(sizes).permute(2, 3, 0, 4, 1, 5)
        elif order == "hnd":
            sizes = (num_blocks, layers, 2, heads, BLOCK_SIZE, dim)
            view = flat.view(sizes).permute(1, 2, 0, 4, 3, 5)
        elif order == "nhd":
            sizes = (num_blocks, layers, 2, BLOCK_SIZE, heads, dim)
            view = flat.view(sizes).permute(1, 2, 0, 3, 4, 5)
        else:
            view = flat.view(layers, 2, num_blocks, BLOCK_SIZE, heads, dim)
        self.keys = [view[layer, 0] for layer in range(layers)]
        self.values = [view[layer, 1] for layer in range(layers)]


class Rows:
    """Rows of sequences, and their attention in all layers, one call a layer as in a model."""

    def __init__(
        self,
        machine: Machine,
        shape: Shape,
        memory: PagedMemory,
        spans: list[tuple[int, int]],
        rows_per_tile: int = 1,
    ) -> None:
        """`spans`: position of the first row, and number of rows, of each sequence."""
        self._shape, self._memory = shape, memory
        self._rows_per_tile = rows_per_tile
        self._plan = _plan(machine, memory, spans, rows_per_tile)
        count = sum(rows for _, rows in spans)

        def drawn(heads: int) -> Tensor:
            return torch.randn(count, heads, shape.dim, device=machine.device).to(shape.dtype)

        self._new = drawn(shape.heads), drawn(shape.kv_heads), drawn(shape.kv_heads)

    def attend(self, splits: int, kernels: str = "auto") -> Tensor:
        """The result of the last layer."""
        out = self._new[0]
        for keys, values in zip(self._memory.keys, self._memory.values, strict=True):
            out = paged_attention(
                *self._new,
                keys,
                values,
                self._plan,
                scaling=self._shape.dim**-0.5,
                splits=splits,
                rows_per_tile=self._rows_per_tile,
                kernels=kernels,
            )
        return out


def _plan(
    machine: Machine, memory: PagedMemory, spans: list[tuple[int, int]], rows_per_tile: int
) -> AttentionPlan:
    """Blocks are scattered at random, as they are after a while of serving."""
    num_blocks = memory.keys[0].shape[0]
    order = np.random.default_rng(0).permutation(num_blocks).tolist()
    steps = []
    for start, rows in spans:
        count = -(-(start + rows) // BLOCK_SIZE)
        table = tuple(BlockId(order.pop()) for _ in range(count))
        steps.append(SequenceStep(token_ids=(0,) * rows, start=start, block_table=table))
    batch = pack(StepBatch(tuple(steps)), BLOCK_SIZE)
    width = table_width(batch, BLOCK_SIZE)
    shape = PlanShape.of(batch, width=width, rows_per_tile=rows_per_tile)
    values = np.empty(shape.num_values, dtype=np.int32)
    write_plan(batch, shape, values, BLOCK_SIZE)
    return AttentionPlan.over(torch.from_numpy(values).to(machine.device), shape)
