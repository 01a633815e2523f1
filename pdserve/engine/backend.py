"""What differs between a model on the host and one on a device, as `PagedModel` sees it.

model       its weights lie on the backend's device
backend     prepares the model, makes KV memory, and attends over it
attention   a step's packed batch on the device, and who answers its attention calls
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.invariants import check_invariant
from pdserve.domain.layout import BlockOrder, KvLayout
from pdserve.engine.attention import AttentionTarget
from pdserve.engine.fused_layer import fuse_layers
from pdserve.engine.fused_mlp import fuse_mlps
from pdserve.engine.fused_norm import fuse_norms
from pdserve.engine.fused_rotary import fuse_rotary
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore
from pdserve.engine.numba_attention import CompiledAttention, compile_attention
from pdserve.engine.packed_linear import pack_linears
from pdserve.engine.packing import NO_SOURCE, PackedBatch
from pdserve.engine.paged_cache import PagedCache, PagedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One pass of a model, on its device; a spare row comes after the batch's."""

    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    sampled_rows: Tensor  # int64, rows whose logits are wanted
    target: AttentionTarget


class BatchAttention(Protocol):
    """Attention over one KV memory."""

    block_size: int

    def inputs(self, batch: PackedBatch, spare_position: int | None) -> StepInputs:
        """Bring a batch to the device. A spare row at that position is computed beside it."""
        ...


class ModelBackend(Protocol):
    """Where a model computes, and how."""

    order: BlockOrder
    """Of the blocks that its attention reads."""

    def prepare(self, model: Any) -> None:
        """Make the layers of a loaded model faster; it computes the same."""
        ...

    def open_kv(self, layout: KvLayout, num_blocks: int) -> KvStore: ...

    def attention(self, kv: KvStore) -> BatchAttention: ...


class DenseAttention:
    """Satisfies `BatchAttention` on any device, request by request; with numba on the host.

    A batch goes to the device array by array, and the host waits for it: the fallback there.
    """

    def __init__(self, cache: PagedCache, device: torch.device) -> None:
        self._cache = cache
        self._device = device
        self.block_size = cache.block_size

    def inputs(self, batch: PackedBatch, spare_position: int | None) -> StepInputs:
        is_known = bool((batch.sources == NO_SOURCE).all())
        check_invariant(is_known, "dense attention follows no draw", batch.sources)
        token_ids, positions = batch.token_ids, batch.positions
        if spare_position is not None:
            token_ids, positions = np.append(token_ids, 0), np.append(positions, spare_position)
        return StepInputs(
            token_ids=torch.from_numpy(token_ids).to(self._device),
            positions=torch.from_numpy(positions).to(self._device),
            sampled_rows=torch.from_numpy(batch.sampled_rows).to(self._device),
            target=PagedStep(self._cache, batch, self._device),
        )


class HostBackend:
    """Satisfies `ModelBackend` on the CPU."""

    order = BlockOrder.TOKENS

    def __init__(self, attention: str, dtype: str) -> None:
        """`attention`: see `TorchEngine.load`; `LocalFault` if it cannot be had for `dtype`."""
        self._compiled = _choose_attention(attention, dtype)

    def prepare(self, model: Any) -> None:
        pack_linears(model)
        fuse_norms(model)
        fuse_mlps(model)
        fuse_rotary(model)
        fuse_layers(model)

    def open_kv(self, layout: KvLayout, num_blocks: int) -> KvMemory:
        return KvMemory(layout, num_blocks)

    def attention(self, kv: KvStore) -> DenseAttention:
        return DenseAttention(PagedCache(kv, self._compiled), torch.device("cpu"))


def _choose_attention(attention: str, dtype: str) -> CompiledAttention | None:
    if attention not in ("auto", "numba", "torch"):
        raise LocalFault(f"attention must be auto, numba or torch; got {attention}")
    return None if attention == "torch" else compile_attention(dtype)
