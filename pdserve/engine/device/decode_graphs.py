"""Decode steps as recorded graphs, one for each of a few batch sizes.

    batch of 5 ──▶ bucket of 8: rows 5, 6, 7 are padding ──▶ one copy ──▶ replay ──▶ logits, arg max

A launch of an operator costs the host several microseconds, and a step of a large model has
thousands; a graph is launched as one. Everything in it lies at fixed addresses, so what differs
between steps is copied into one memory that all graphs read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pdserve.engine.attention import AttentionTarget
from pdserve.engine.contract import StepBatch
from pdserve.engine.device.device_attention import DeviceAttention, StepMemory
from pdserve.engine.device.device_draws import DrawPlan, greedy_tokens
from pdserve.engine.device.plan import PlanShape
from pdserve.engine.device.runtime import DeviceGraph, DeviceRuntime
from pdserve.engine.device.staging import Stager
from pdserve.engine.packing import pack

_DRAW_VALUES = 8  # int64 for each row: the columns of a `DrawPlan` are 3 and 5, and exclude another


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and the largest: at most 7 rows of padding, or as many as rows."""
    sizes = [size for size in (1, 2, 4, *range(8, max_batch, 8)) if size < max_batch]
    return [*sizes, max_batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLogits:
    """What a forward leaves on the device."""

    logits: Tensor  # [rows, vocabulary]
    greedy: Tensor | None  # int64 [rows]: see `greedy_tokens`; None at a rank that does not draw
    plain: Tensor  # the columns of the step's `DrawPlan`
    cut: Tensor


class Passes(Protocol):
    """A model whose weights are on the device; `PagedModel` is one."""

    def run(self, token_ids: Tensor, positions: Tensor, target: AttentionTarget) -> Tensor:
        """Logits of each row; int64 [rows] each."""
        ...


class DecodeGraphs:
    """One for each of `batch_sizes`. All calls are made by the engine's thread, on its stream."""

    def __init__(
        self,
        model: Passes,
        attention: DeviceAttention,
        runtime: DeviceRuntime,
        stager: Stager,
        *,
        sizes: Sequence[int],
        width: int,
        draws: bool = True,
    ) -> None:
        """Record them, the largest first, whose memory the others share.

        `width`: of block tables, none of which is longer.
        """
        self._model, self._attention = model, attention
        self._draws = draws
        self._stager = stager
        self._sizes = sorted(sizes)
        self._memories = {
            size: StepMemory(
                plan=PlanShape.decode(size, width=width), num_draw_values=_DRAW_VALUES * size
            )
            for size in self._sizes
        }
        largest = self._memories[self._sizes[-1]].num_bytes
        self._copied = runtime.empty(largest, dtype=torch.uint8)
        self._graphs: dict[int, DeviceGraph] = {}
        graph: DeviceGraph | None = None
        for size in reversed(self._sizes):
            self._send_padding(self._memories[size])
            self._compute(size)  # what it needs for the first time must not be recorded
            graph = runtime.capture(partial(self._compute, size), like=graph)
            self._graphs[size] = graph
        runtime.synchronize()

    def _send_padding(self, memory: StepMemory) -> None:
        memory.write_padding(self._stager.take(memory.num_bytes))
        self._stager.send(memory.num_bytes, self._copied)

    @torch.inference_mode()
    def _compute(self, size: int) -> tuple[Tensor, Tensor | None]:
        memory, copied = self._memories[size], self._copied
        logits = self._model.run(
            memory.token_ids(copied, self._attention.feed),
            memory.positions(copied),
            self._attention.step(memory, copied),
        )
        return logits, greedy_tokens(logits) if self._draws else None

    def size_for(self, batch: StepBatch) -> int | None:
        """The bucket of a batch; None if it is no decode step, or has too many requests."""
        if not all(each.sample and len(each.token_ids) == 1 for each in batch.sequences):
            return None
        count = len(batch.sequences)
        return next((size for size in self._sizes if size >= count), None)

    def run(self, batch: StepBatch, draws: DrawPlan, size: int) -> StepLogits:
        """Submit the step; results last until the next one."""
        packed, memory = pack(batch, self._attention.block_size), self._memories[size]
        taken = self._stager.take(memory.num_bytes)
        memory.write(taken, packed, self._attention.block_size)
        memory.write_draws(taken, draws)
        self._stager.send(memory.num_bytes, self._copied)
        logits, greedy = self._graphs[size].replay()
        plain, cut = memory.draws(self._copied, draws)
        count = len(batch.sequences)
        greedy = None if greedy is None else greedy[:count]
        return StepLogits(logits=logits[:count], greedy=greedy, plain=plain, cut=cut)

    def close(self) -> None:
        """Before the model and its collectives go."""
        self._graphs.clear()
