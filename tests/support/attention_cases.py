"""Cases of paged attention on a device, and how a result is judged against `attend_dense`.

Run as a module, with TRITON_INTERPRET=1, it runs the kernels on the CPU.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.domain.ids import BlockId
from pdserve.engine.attention import AttentionCall, attend_dense, first_visible
from pdserve.engine.contract import SequenceStep, StepBatch
from pdserve.engine.device.op import paged_attention
from pdserve.engine.device.plan import AttentionPlan, PlanShape, table_width, write_plan
from pdserve.engine.packing import PackedBatch, pack
from pdserve.engine.paged_cache import DTYPES

NAN, INFINITE = "nan", "inf"
TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}

Span = tuple[int, int]
DECODES: tuple[Span, ...] = ((20, 1), (0, 1), (47, 1), (100, 1))  # (start, rows) of each sequence
CHUNKS: tuple[Span, ...] = ((0, 21), (13, 18), (40, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    spans: tuple[Span, ...] = DECODES
    heads: int = 8
    kv_heads: int = 2
    k_dim: int = 32
    v_dim: int = 32
    block_size: int = 16
    dtype: str = "float32"
    order: str = "nhd"  # inside a block: nhd, hnd, heads; or apart: a memory for each layer
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    splits: int = 1
    rows_per_tile: int = 1
    padding: int = 0  # rows, sequences and tiles that are nobody's
    queries: str = ""  # of the first sequence: nan or inf; else all are numbers
    seed: int = 0


MIXED = (*CHUNKS, *DECODES)
_LISTED = (
    Case(name="decode"),
    Case(name="decode, grouped 7 to 1", heads=14, kv_heads=2, k_dim=24, v_dim=24),
    Case(name="decode, one KV head", heads=8, kv_heads=1, splits=8),
    Case(name="decode, a KV head for each head", heads=4, kv_heads=4, k_dim=80, v_dim=80),
    Case(name="decode, K and V of different sizes", kv_heads=8, k_dim=24, v_dim=20, splits=2),
    Case(name="decode, V larger than K", k_dim=16, v_dim=40, splits=3),
    Case(name="decode, 2 splits", splits=2),
    Case(name="decode, 3 splits, heads first", splits=3, order="heads"),
    Case(name="decode, 5 splits, head by head", splits=5, order="hnd"),
    Case(name="decode, 8 splits, layers apart", splits=8, order="apart"),
    Case(name="decode, 11 splits", splits=11),
    Case(name="decode, window", window=17, splits=2),
    Case(name="decode, window of one", window=1),
    Case(name="decode, chunks", chunk=24, splits=2),
    Case(name="decode, soft cap", softcap=5.0, splits=4),
    Case(name="decode, soft cap of Gemma 2", softcap=50.0),
    Case(name="decode, sinks", has_sinks=True, splits=4),
    Case(name="decode, sinks whole", has_sinks=True),
    Case(name="decode, window, soft cap, sinks", window=9, softcap=3.0, has_sinks=True, splits=3),
    Case(name="decode, blocks of 1", block_size=1, splits=2),
    Case(name="decode, blocks of 7", block_size=7, splits=2, order="hnd"),
    Case(name="decode, blocks of 7, window", block_size=7, window=30, order="heads"),
    Case(name="decode, padded", padding=3),
    Case(name="decode, padded and split", padding=5, splits=4),
    Case(name="decode, mostly padding", spans=((3, 1),), padding=4, splits=2),
    Case(name="chunks", spans=CHUNKS, rows_per_tile=8),
    Case(name="chunks, tiles of one row", spans=CHUNKS),
    Case(name="chunks, tiles of 32 rows", spans=CHUNKS, rows_per_tile=32),
    Case(name="chunks, window and soft cap", spans=CHUNKS, window=9, softcap=3.0, rows_per_tile=16),
    Case(name="chunks, chunks and sinks", spans=CHUNKS, chunk=16, has_sinks=True, rows_per_tile=16),
    Case(name="chunks, blocks of 1", spans=CHUNKS, block_size=1, rows_per_tile=8),
    Case(name="chunks, blocks of 7, one KV head", spans=CHUNKS, block_size=7, kv_heads=1),
    Case(name="mixed", spans=MIXED, rows_per_tile=8, padding=3),
    Case(name="mixed and split", spans=MIXED, rows_per_tile=16, splits=3, padding=2),
    Case(name="mixed, window, sinks", spans=MIXED, rows_per_tile=8, window=12, has_sinks=True),
    Case(name="mixed, K 24 and V 20, heads first", spans=MIXED, k_dim=24, v_dim=20, order="heads"),
    Case(name="decode in bfloat16", dtype="bfloat16", splits=4),
    Case(name="decode in float16", dtype="float16", splits=2, softcap=30.0),
    Case(name="mixed in bfloat16", spans=MIXED, dtype="bfloat16", rows_per_tile=8, padding=1),
    Case(name="mixed in float16, window, sinks", spans=MIXED, dtype="float16", rows_per_tile=8,
         window=12, has_sinks=True),
    Case(name="decode, a query is NaN", queries=NAN, splits=2),
    Case(name="decode, a query is infinite", queries=INFINITE),
    Case(name="decode, a query is infinite, soft cap", queries=INFINITE, softcap=5.0, splits=2),
    Case(name="chunks, queries are infinite", spans=CHUNKS, queries=INFINITE, rows_per_tile=8),
    Case(name="chunks in float16, a query is NaN", spans=CHUNKS, queries=NAN, dtype="float16",
         rows_per_tile=8, has_sinks=True),
)  # fmt: skip
CASES = tuple(replace(case, seed=seed) for seed, case in enumerate(_LISTED))


def verdict(case: Case, attend: Callable[..., Tensor], device: str = "cpu") -> list[str]:
    """What is wrong with the result of `attend` for `case`; empty if nothing is.

    It takes what `pdserve.engine.device.op.paged_attention` takes.
    """
    return _Trial(case, device).faults(attend)


class _Trial:
    """Memory in which all that a row must not see is NaN."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        self.random = torch.Generator().manual_seed(case.seed)
        self.batch = self._batch()
        self.keys, self.values = self._memory()
        num_rows = self.batch.num_rows + case.padding
        self.query = self._draw(num_rows, case.heads, case.k_dim)
        self.key = self._draw(num_rows, case.kv_heads, case.k_dim)
        self.value = self._draw(num_rows, case.kv_heads, case.v_dim)
        self.sinks = torch.randn(case.heads, generator=self.random) if case.has_sinks else None
        self._spoil_queries()

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(DTYPES[self.case.dtype])

    def _batch(self) -> PackedBatch:
        sizes = [-(-(start + rows) // self.case.block_size) for start, rows in self.case.spans]
        blocks = torch.randperm(sum(sizes) + 3, generator=self.random).tolist()
        steps = [
            SequenceStep(
                token_ids=(0,) * rows,
                start=start,
                # A block more than is used, as a request has whose answer has a place reserved.
                block_table=tuple(BlockId(blocks.pop()) for _ in range(size + (place == 0))),
            )
            for place, ((start, rows), size) in enumerate(zip(self.case.spans, sizes, strict=True))
        ]
        return pack(StepBatch(tuple(steps)), self.case.block_size)

    def _memory(self) -> tuple[Tensor, Tensor]:
        """K and V of the second of two layers, NaN but for what earlier steps have stored."""
        case = self.case
        num_blocks = int(self.batch.tables.max()) + 3
        shape = (num_blocks, case.block_size, case.kv_heads)
        caches = layer_views(shape, case.k_dim, case.v_dim, DTYPES[case.dtype], case.order)
        for start, table_first in zip(self.batch.starts, self.batch.table_firsts, strict=True):
            places = np.arange(start)
            blocks = self.batch.tables[table_first + places // case.block_size]
            for cache in caches:
                drawn = self._draw(len(places), case.kv_heads, cache.shape[3])
                cache[blocks, places % case.block_size] = drawn
        return caches

    def _spoil_queries(self) -> None:
        if self.case.queries:
            value = torch.nan if self.case.queries == NAN else torch.inf
            self.query[0, :, 3] = value  # of all heads, as some of a product would be
            self.query[0, 0, :] = value

    def faults(self, attend: Callable[..., Tensor]) -> list[str]:
        keys, values = (_on(part, self.device) for part in (self.keys, self.values))
        out = self._attend(attend, keys, values).cpu()
        keys, values = keys.cpu(), values.cpu()
        num_rows = self.batch.num_rows
        faults = []
        if not bool((out[num_rows:] == 0).all()):
            faults.append("padded rows are not zeros")
        expected = self._expected()
        if not torch.equal(torch.isnan(out[:num_rows]), torch.isnan(expected)):
            faults.append("NaN where there is none, or none where there is")
        worst = float((out[:num_rows] - expected).abs().nan_to_num().max())
        if worst > TOLERANCE[self.case.dtype]:
            faults.append(f"differs by {worst}")
        for held, cache, part in ((keys, self.keys, self.key), (values, self.values, self.value)):
            wanted = cache.clone()
            wanted[self.batch.row_blocks, self.batch.row_offsets] = part[:num_rows]
            if not torch.equal(wanted.nan_to_num(nan=7.0), held.nan_to_num(nan=7.0)):
                faults.append("memory is not as it should be")
        return faults

    def _attend(self, attend: Callable[..., Tensor], keys: Tensor, values: Tensor) -> Tensor:
        case = self.case
        plan = make_plan(self.batch, case.block_size, case.rows_per_tile, case.padding)
        sinks = None if self.sinks is None else self.sinks.to(self.device)
        return attend(
            *(part.to(self.device) for part in (self.query, self.key, self.value)),
            keys,
            values,
            plan_on(plan, self.device),
            scaling=case.k_dim**-0.5,
            window=case.window,
            chunk=case.chunk,
            softcap=case.softcap,
            sinks=sinks,
            splits=case.splits,
            rows_per_tile=case.rows_per_tile,
        )

    def _expected(self) -> Tensor:
        """[rows, heads, v_dim] in float32; NaN for heads whose query is not finite."""
        case = self.case
        parts = []
        rows = zip(self.batch.firsts, case.spans, self.batch.table_firsts, strict=True)
        for first, (start, length), table_first in rows:
            own = slice(int(first), int(first) + length)
            places = np.arange(start)
            blocks = self.batch.tables[table_first + places // case.block_size]
            offsets = places % case.block_size
            key = torch.cat([self.keys[blocks, offsets], self.key[own]]).float().transpose(0, 1)
            value = torch.cat([self.values[blocks, offsets], self.value[own]]).float()
            call = AttentionCall(
                layer=0,
                query=self.query[own].float().transpose(0, 1),
                key=key,
                value=value.transpose(0, 1),
                scaling=case.k_dim**-0.5,
                window=case.window,
                chunk=case.chunk,
                softcap=case.softcap,
                sinks=self.sinks,
            )
            parts.append(_dense(call, start))
        expected = torch.cat(parts)
        is_finite = torch.isfinite(self.query[: len(expected)]).all(-1)
        return expected.masked_fill(~is_finite[..., None], torch.nan)


def _dense(call: AttentionCall, start: int) -> Tensor:
    """[rows, heads, v_dim]. A single row has no mask in `attend_dense`: it gets what it sees."""
    first = 0
    if call.query.shape[1] == 1:
        first = first_visible(call, start)
    key, value = call.key[:, first:], call.value[:, first:]
    return attend_dense(call, call.query, key, value, start, first).transpose(0, 1)


def layer_views(
    shape: tuple[int, int, int], k_dim: int, v_dim: int, dtype: torch.dtype, order: str
) -> tuple[Tensor, Tensor]:
    """K and V of the second of two layers: [num_blocks, block_size, kv_heads, dim], all NaN.

    The orders inside a block, which is one piece of memory but for `apart`:

        nhd     layer, K or V, place, head
        hnd     layer, K or V, head, place
        heads   head, layer, K or V, place
        apart   a memory for each layer and for K and V, each as in nhd
    """
    num_blocks, block_size, kv_heads = shape
    if order == "apart":
        keys, values = (torch.full((*shape, dim), torch.nan, dtype=dtype) for dim in (k_dim, v_dim))
        return keys, values
    size = block_size * (k_dim + v_dim)  # values of a head of a layer
    flat = torch.full((num_blocks, 2 * kv_heads * size), torch.nan, dtype=dtype)
    if order == "heads":
        own = flat.view(num_blocks, kv_heads, 2, size)[:, :, 1]
        parts = own[..., : block_size * k_dim], own[..., block_size * k_dim :]
        sizes = (num_blocks, kv_heads, block_size, -1)
        keys, values = (part.view(sizes).transpose(1, 2) for part in parts)
        return keys, values
    own, k_size = flat[:, kv_heads * size :], kv_heads * block_size * k_dim
    parts = own[:, :k_size], own[:, k_size:]
    if order == "hnd":
        sizes = (num_blocks, kv_heads, block_size, -1)
        keys, values = (part.view(sizes).transpose(1, 2) for part in parts)
        return keys, values
    keys, values = (part.view(*shape, -1) for part in parts)
    return keys, values


def make_plan(batch: PackedBatch, block_size: int, rows_per_tile: int, padding: int) -> Any:
    """(shape, arrays) with `padding` rows, sequences and tiles more than the batch has."""
    own = PlanShape.of(batch, width=table_width(batch, block_size), rows_per_tile=rows_per_tile)
    shape = PlanShape(
        rows=own.rows + padding,
        sequences=own.sequences + padding,
        width=own.width + padding,
        tiles=own.tiles + padding,
        rows_per_tile=rows_per_tile,
    )
    memory = np.empty(shape.num_values, dtype=np.int32)
    write_plan(batch, shape, memory, block_size)
    return shape, memory


def plan_on(plan: Any, device: str) -> AttentionPlan:
    shape, memory = plan
    return AttentionPlan.over(torch.from_numpy(memory).to(device), shape)


def _on(part: Tensor, device: str) -> Tensor:
    """A copy there with the same strides."""
    copy = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=device)
    return copy.copy_(part)


def main() -> None:
    """Print a line of JSON for each case: its name, and what is wrong with Triton's result."""
    torch.set_num_threads(1)
    for case in CASES:
        faults = verdict(case, partial(paged_attention, kernels="triton"))
        print(json.dumps([case.name, faults]), flush=True)


if __name__ == "__main__":
    main()
