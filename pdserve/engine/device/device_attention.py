"""A packed batch on a device, and its attention through one operator."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.attention import AttentionCall
from pdserve.engine.backend import StepInputs
from pdserve.engine.device.device_draws import DrawPlan
from pdserve.engine.device.op import paged_attention
from pdserve.engine.device.plan import PADDING, AttentionPlan, PlanShape, table_width, write_plan
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.device.staging import Bytes, Stager
from pdserve.engine.device.token_feed import TokenFeed
from pdserve.engine.device.variants import choose_splits
from pdserve.engine.packing import NO_SOURCE, PackedBatch
from pdserve.engine.paged_cache import PagedCache

INT64, INT32 = 8, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Where the arrays of a step lie in the one piece that is copied.

    | token ids | positions | sources | sampled rows | draws |   int64
    | attention plan |                                           int32
    """

    plan: PlanShape  # its rows are those of ids and positions
    num_sampled: int = 0
    num_draw_values: int = 0  # room for both columns of a `DrawPlan`

    @property
    def num_int64(self) -> int:
        return self._first_draw + self.num_draw_values

    @property
    def _first_draw(self) -> int:
        return 3 * self.plan.rows + self.num_sampled

    @property
    def num_bytes(self) -> int:
        return self.num_int64 * INT64 + self.plan.num_values * INT32

    def write(self, memory: Bytes, batch: PackedBatch, block_size: int) -> None:
        """All but the draws; rows beyond the batch's have token 0 at position 0."""
        numbers = memory[: self.num_int64 * INT64].view(np.int64)
        rows, count = self.plan.rows, batch.num_rows
        for start, column, padding in (
            (0, batch.token_ids, 0),
            (rows, batch.positions, 0),
            (2 * rows, batch.sources, NO_SOURCE),
        ):
            numbers[start : start + count] = column
            numbers[start + count : start + rows] = padding
        numbers[3 * rows : self._first_draw] = batch.sampled_rows[: self.num_sampled]
        write_plan(batch, self.plan, memory[self.num_int64 * INT64 :].view(np.int32), block_size)

    def write_padding(self, memory: Bytes) -> None:
        """A batch of no rows: nothing is stored, nothing attended."""
        memory[...] = 0
        rows = self.plan.rows
        memory[2 * rows * INT64 : 3 * rows * INT64].view(np.int64)[:] = NO_SOURCE
        plan = memory[self.num_int64 * INT64 :].view(np.int32)
        self.plan.views(plan)["row_blocks"][...] = PADDING

    def write_draws(self, memory: Bytes, draws: DrawPlan) -> None:
        first = self._first_draw
        room = memory[first * INT64 : (first + self.num_draw_values) * INT64].view(np.int64)
        room[: draws.plain.size] = draws.plain.ravel()
        room[draws.plain.size : draws.plain.size + draws.cut.size] = draws.cut.ravel()

    def numbers(self, copied: Tensor) -> Tensor:
        return copied[: self.num_int64 * INT64].view(torch.int64)

    def token_ids(self, copied: Tensor, feed: TokenFeed) -> Tensor:
        """Of all rows, those that follow a draw included."""
        numbers, rows = self.numbers(copied), self.plan.rows
        return feed.fill(numbers[:rows], numbers[2 * rows : 3 * rows])

    def positions(self, copied: Tensor) -> Tensor:
        return self.numbers(copied)[self.plan.rows : 2 * self.plan.rows]

    def attention_plan(self, copied: Tensor) -> AttentionPlan:
        start = self.num_int64 * INT64
        memory = copied[start : start + self.plan.num_values * INT32].view(torch.int32)
        return AttentionPlan.over(memory, self.plan)

    def draws(self, copied: Tensor, plan: DrawPlan) -> tuple[Tensor, Tensor]:
        """The columns that `write_draws` wrote."""
        values, middle = self.numbers(copied)[self._first_draw :], plan.plain.size
        return (
            values[:middle].view(plan.plain.shape),
            values[middle : middle + plan.cut.size].view(plan.cut.shape),
        )


class DeviceStep:
    """Answers a step's attention calls on the device. Satisfies `AttentionTarget`."""

    def __init__(
        self,
        cache: PagedCache,
        memory: StepMemory,
        copied: Tensor,
        *,
        num_processors: int,
        kernels: str,
    ) -> None:
        self._cache = cache
        self._shape = memory.plan
        self._plan = memory.attention_plan(copied)
        self._positions = memory.positions(copied)
        self._num_processors = num_processors
        self._kernels = kernels

    def attend(self, call: AttentionCall) -> Tensor:
        query = call.query
        if call.temperature is not None:
            query = query * call.temperature.factors(self._positions).to(query.dtype)[:, None]
        shape = self._shape
        splits = choose_splits(
            shape.tiles,
            call.key.shape[0],
            self._num_processors,
            shape.width * self._cache.block_size,
        )
        return paged_attention(
            query.transpose(0, 1),
            call.key.transpose(0, 1),
            call.value.transpose(0, 1),
            self._cache.keys[call.layer],
            self._cache.values[call.layer],
            self._plan,
            scaling=call.scaling,
            window=call.window,
            chunk=call.chunk,
            softcap=call.softcap,
            sinks=call.sinks,
            splits=splits,
            rows_per_tile=shape.rows_per_tile,
            kernels=self._kernels,
        )


class DeviceAttention:
    """Satisfies `BatchAttention` over memory of a device; one copy brings a batch there."""

    def __init__(
        self,
        cache: PagedCache,
        runtime: DeviceRuntime,
        stager: Stager,
        *,
        kernels: str,
        chunk_rows_per_tile: int,
        feed: TokenFeed,
    ) -> None:
        """`kernels`: as `paged_attention` takes them; `feed` has what rows may follow."""
        self._cache = cache
        self.feed = feed
        self.block_size = self._cache.block_size
        self._runtime = runtime
        self._stager = stager
        self._kernels = kernels
        self._chunk_rows_per_tile = chunk_rows_per_tile

    def inputs(self, batch: PackedBatch, spare_position: int | None) -> StepInputs:
        memory = self._memory_of(batch, has_spare=spare_position is not None)
        taken = self._stager.take(memory.num_bytes)
        memory.write(taken, batch, self.block_size)
        if spare_position is not None:
            taken[: memory.num_int64 * INT64].view(np.int64)[2 * memory.plan.rows - 1] = (
                spare_position
            )
        copied = self._stager.send(memory.num_bytes)
        numbers, rows = memory.numbers(copied), memory.plan.rows
        follows = bool((batch.sources >= 0).any())
        return StepInputs(
            token_ids=memory.token_ids(copied, self.feed) if follows else numbers[:rows],
            positions=memory.positions(copied),
            sampled_rows=numbers[3 * rows :],
            target=self.step(memory, copied),
        )

    def _memory_of(self, batch: PackedBatch, *, has_spare: bool) -> StepMemory:
        longest = int(batch.lengths.max())
        shape = PlanShape.of(
            batch,
            width=table_width(batch, self.block_size),
            rows_per_tile=1 if longest == 1 else self._chunk_rows_per_tile,
        )
        if has_spare:
            shape = replace(shape, rows=shape.rows + 1)
        return StepMemory(plan=shape, num_sampled=len(batch.sampled_rows))

    def step(self, memory: StepMemory, copied: Tensor) -> DeviceStep:
        return DeviceStep(
            self._cache,
            memory,
            copied,
            num_processors=self._runtime.num_processors,
            kernels=self._kernels,
        )
