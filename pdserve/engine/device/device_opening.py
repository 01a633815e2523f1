"""From a loaded model to an engine's steps on a device, within a share of its memory.

memory_fraction of the device = weights | largest step | graphs | KV blocks
                                --------- measured ---------   what is left
"""

from dataclasses import dataclass
from typing import Any

import structlog
import torch

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.layout import BlockOrder, KvLayout
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch, StepLimits
from pdserve.engine.device.decode_graphs import batch_sizes
from pdserve.engine.device.device_backend import DeviceBackend, gib
from pdserve.engine.device.device_stepper import DeviceStepper
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.paged_model import PagedModel
from pdserve.engine.rank_group import RankGroup

_GRAPH_BYTES = 8 << 20  # what a further graph takes, beside the memory that all share

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoom:
    """How much of a device one engine takes; made before its weights are there."""

    runtime: DeviceRuntime
    share_bytes: int
    free_bytes: int  # before anything of this engine

    @classmethod
    def of(cls, runtime: DeviceRuntime, memory_fraction: float) -> "DeviceRoom":
        share = int(memory_fraction * runtime.total_bytes())
        return cls(runtime=runtime, share_bytes=share, free_bytes=runtime.free_bytes())

    def left_bytes(self) -> int:
        """Of the share; others may have taken some of what was free, or given some back."""
        free = self.runtime.free_bytes()
        return min(self.share_bytes - max(0, self.free_bytes - free), free)


def open_on_device(
    module: Any,
    files: ModelFiles,
    room: DeviceRoom,
    *,
    block_size: int,
    num_blocks: int | None,
    dtype: str,
    attention: str,
    order: BlockOrder,
    limits: StepLimits,
    compiler: str | None = None,
    draws: bool = True,
    group: RankGroup | None = None,
) -> tuple[PagedModel, DeviceStepper]:
    """A model whose weights are on the device, and its steps, which own it.

    A rank that does not draw gives no tokens. All ranks of `group` do this at once.
    """
    backend = DeviceBackend(
        room.runtime,
        attention,
        order,
        max_num_requests=limits.max_num_requests,
        compiler=compiler,
    )
    try:
        model = PagedModel(
            module,
            block_size=block_size,
            num_blocks=None,
            dtype=dtype,
            max_context_tokens=files.max_context_tokens,
            backend=backend,
        )
    except BaseException:
        backend.close()
        raise
    stepper = open_stepper(
        model,
        backend,
        limits=limits,
        num_blocks=num_blocks,
        room_bytes=room.left_bytes(),
        max_context_tokens=files.max_context_tokens,
        vocab_size=files.vocab_size,
        eos_token_ids=files.eos_token_ids,
        draws=draws,
        group=group,
    )
    return model, stepper


def open_stepper(
    model: PagedModel,
    backend: DeviceBackend,
    *,
    limits: StepLimits,
    num_blocks: int | None,
    room_bytes: int,
    max_context_tokens: int,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    draws: bool = True,
    group: RankGroup | None = None,
) -> DeviceStepper:
    """Give `model`, which has no KV yet, its blocks, record its decode steps, and take it over.

    `room_bytes`: what its KV and steps may still take. `num_blocks` None: as many as fit, with a
    group on each of its ranks. `LocalFault` if none does, or fewer than the given number, with what
    would.
    """
    stepper = DeviceStepper(
        model, backend, vocab_size=vocab_size, eos_token_ids=eos_token_ids, draws=draws
    )
    runtime, layout = backend.runtime, model.layout
    sizes = batch_sizes(limits.max_num_requests)
    width = min(layout.num_blocks_for(max_context_tokens), max(1, room_bytes // layout.block_bytes))
    try:
        room = min(room_bytes, runtime.free_bytes())
        most = (room - _largest_bytes(stepper, model, runtime, limits, width)) // layout.block_bytes
        if group is not None:
            most = group.least(most, runtime.device)
        chosen = _checked(num_blocks, most, layout, runtime, limits)
        model.open_kv(chosen)
        is_recorded = stepper.record(sizes, min(width, chosen))
    except torch.OutOfMemoryError as error:
        stepper.close()
        raise LocalFault(
            f"{runtime.device} has too little memory for the largest step ({_step_text(limits)}): "
            f"{gib(room_bytes)} are left beside the weights. Lower max_num_requests or "
            "max_step_tokens, or raise memory_fraction"
        ) from error
    except BaseException:
        stepper.close()
        raise
    log.info(
        "device.opened",
        device=str(runtime.device),
        num_blocks=chosen,
        kv_bytes=chosen * layout.block_bytes,
        free_bytes=runtime.free_bytes(),
        is_recorded=is_recorded,
        is_compiled=backend.codes is not None,
    )
    return stepper


def _largest_bytes(
    stepper: DeviceStepper,
    model: PagedModel,
    runtime: DeviceRuntime,
    limits: StepLimits,
    width: int,
) -> int:
    """What the largest step and the graphs take, found out by running and recording them.

    The one block of KV that there is for it stands for all: what is computed does not matter.
    """
    before = runtime.free_bytes()
    model.open_kv(1)
    sizes = batch_sizes(limits.max_num_requests)
    stepper.run(_largest_batch(model.layout, limits))
    step_bytes = before - runtime.free_bytes()
    runtime.trim()  # recording does it anyway: the two are measured apart
    before = runtime.free_bytes()
    is_recorded = stepper.record(sizes[-1:], width)
    runtime.synchronize()
    graph_bytes = before - runtime.free_bytes()
    stepper.forget()
    model.close_kv()
    runtime.trim()
    return step_bytes + graph_bytes + (_GRAPH_BYTES * (len(sizes) - 1) if is_recorded else 0)


def _largest_batch(layout: KvLayout, limits: StepLimits) -> StepBatch:
    """As many requests as there can be, each with its share of a prompt, and sampled."""
    sample = SampleStep(params=SamplingParams(temperature=1.0, top_p=0.9), token_index=1)
    length = -(-limits.max_num_tokens // limits.max_num_requests) + 1
    step = SequenceStep(
        token_ids=(0,) * length,
        start=0,
        block_table=(BlockId(0),) * layout.num_blocks_for(length),
        sample=sample,
    )
    return StepBatch((step,) * limits.max_num_requests)


def _checked(
    wanted: int | None, most: int, layout: KvLayout, runtime: DeviceRuntime, limits: StepLimits
) -> int:
    if most < 1 or (wanted or 0) > most:
        asked = f"num_blocks {wanted}: so many" if wanted else "not one of the"
        raise LocalFault(
            f"{asked} KV blocks of {layout.block_bytes} bytes do not fit on {runtime.device}: "
            f"beside the weights and the largest step ({_step_text(limits)}) there is room for "
            f"{max(0, most)}. Raise memory_fraction, lower num_blocks, max_num_requests or "
            "max_step_tokens, or give the worker more ranks"
        )
    return wanted or most


def _step_text(limits: StepLimits) -> str:
    return f"{limits.max_num_requests} requests, {limits.max_num_tokens} prompt tokens"
