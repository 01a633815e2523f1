"""The engine that runs real models: `transformers` code over a paged KV cache, on any device."""

import contextlib
import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from pdserve.domain.engine_spec import EngineSpec, StepPath
from pdserve.domain.errors import LocalFault
from pdserve.domain.invariants import check_invariant
from pdserve.domain.layout import BlockOrder, ShardedLayout
from pdserve.engine.contract import Drawn, StepBatch, StepLimits, StepResult
from pdserve.engine.device.device_backend import bring_to
from pdserve.engine.device.device_opening import DeviceRoom, open_on_device
from pdserve.engine.device.opening import open_runtime
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import item_bytes
from pdserve.engine.numba_draws import compile_draws
from pdserve.engine.paged_model import PagedModel, load_model
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sampling import draw_tokens
from pdserve.engine.sharding import load_rank_model
from pdserve.engine.sharding.shares import RankShare, share_of
from pdserve.engine.threads import run_to_end
from pdserve.engine.tokenizer import Tokenizer

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT_BYTES = 256 << 20


MAX_UNDER_WAY = 2
"""Steps of an engine that looks ahead: one that computes, and one behind it."""


class Submitted(Protocol):
    """A step that computes, or has computed."""

    def wait(self) -> tuple[list[Drawn], StepPath]:
        """Once it is over: what was drawn for each sequence that samples, in order.

        Nothing at a rank that does not draw.
        """
        ...


class Stepper(Protocol):
    """A loaded model, or a rank's part of one, where it computes. One call at a time."""

    @property
    def looks_ahead(self) -> bool:
        """It takes a step while one is under way; see `Engine`."""
        ...

    def submit(self, batch: StepBatch) -> Submitted:
        """Begin to compute the batch."""
        ...

    def close(self) -> None:
        """Drop the model and its memory."""
        ...


class HostStepper:
    """Satisfies `Stepper` on the CPU: a step that is submitted is over."""

    looks_ahead = False

    def __init__(self, model: PagedModel, eos_token_ids: tuple[int, ...], *, draws: bool) -> None:
        self._model, self._eos_token_ids = model, eos_token_ids
        self._draws = draws

    def submit(self, batch: StepBatch) -> "Computed":
        logits = self._model.forward(batch, batch.on_layers)
        if not self._draws:
            return Computed([])
        steps = [each.sample for each in batch.sequences if each.sample is not None]
        return Computed(draw_tokens(logits.float().numpy(), steps, self._eos_token_ids))

    def close(self) -> None:
        self._model.close()


class Computed:
    """Satisfies `Submitted`."""

    def __init__(self, drawn: list[Drawn]) -> None:
        self._drawn = drawn

    def wait(self) -> tuple[list[Drawn], StepPath]:
        return self._drawn, StepPath.EAGER


class TorchEngine:
    """Satisfies `Engine`. Computes in one thread of its own, with one torch thread.

    On a device this thread packs and submits a step, and another one waits for its end. So the
    event loop answers, sends and plans while the device computes; an engine that looks ahead takes
    the next step meanwhile. Of a rank that does not draw, the tokens are all None.
    """

    def __init__(self, model: PagedModel, stepper: Stepper, spec: EngineSpec) -> None:
        """Take over `stepper`, which has `model`."""
        self.spec = spec
        self.kv = model.kv
        self._model = model
        self._stepper = stepper
        self._thread = ThreadPoolExecutor(1, "engine", initializer=_use_one_thread)
        self._waiter = ThreadPoolExecutor(1, "engine-waits", initializer=_use_one_thread)
        self._num_under_way = 0
        self._ended_s = 0.0

    @classmethod
    def load(
        cls,
        files: ModelFiles | Path,
        *,
        block_size: int,
        num_blocks: int | None,
        dtype: str = "float32",
        device: str | DeviceRuntime = "cpu",
        attention: str = "auto",
        block_order: str = BlockOrder.TOKENS,
        memory_fraction: float = 0.9,
        limits: StepLimits = StepLimits(),  # noqa: B008  frozen
        compiler: str | None = None,
        group: RankGroup | None = None,
    ) -> "TorchEngine":
        """Load weights, and check that the model can be served; `LocalFault` says why if not.

        With `group` only the part of this rank: the other ranks load and compute theirs beside it.
        `device`: cpu, cuda, cuda:N, or a runtime. `attention` on the CPU: `numba` or `torch`
        (gather and SDPA); `auto` takes numba where it can be used. On a device: see
        `DeviceBackend`. There, steps up to `limits` have room, and `num_blocks` None makes as many
        as `memory_fraction` of the device's memory leaves, with a group that of the fullest rank.
        `block_order`: a `BlockOrder`; the CPU reads tokens first. `compiler`: of `torch.compile`,
        for the layers of a whole model on a device; None: as they are.
        """
        item_bytes(dtype)
        _use_one_thread()
        keep_freed_memory()
        compile_draws()
        if isinstance(files, Path):
            files = ModelFiles.open(files)
        runtime = open_runtime(device) if isinstance(device, str) else device
        order = BlockOrder(block_order)
        if runtime is None and order is not BlockOrder.TOKENS:
            raise LocalFault(f"block_order {order}: attention on the CPU reads tokens first")
        if num_blocks is None and runtime is None:
            raise LocalFault("num_blocks must be given for the CPU, whose memory others share")
        if compiler and (runtime is None or group is not None):
            raise LocalFault("compile: only whole models on a device are compiled")
        draws = group is None or group.place.draws
        room = None if runtime is None else DeviceRoom.of(runtime, memory_fraction)
        loaded = (
            load_model(files, dtype)
            if group is None
            else load_rank_model(
                files, dtype, group.place, group, str(runtime.device) if runtime else "cpu"
            )
        )
        if room is not None:
            model, stepper = open_on_device(
                bring_to(loaded, room.runtime),
                files,
                room,
                block_size=block_size,
                num_blocks=num_blocks,
                dtype=dtype,
                attention=attention,
                order=order,
                limits=limits,
                compiler=compiler,
                draws=draws,
                group=group,
            )
            return cls(model, stepper, _spec(files, model, share_of(loaded)))
        model = PagedModel(
            loaded,
            block_size=block_size,
            num_blocks=num_blocks,
            dtype=dtype,
            attention=attention,
            max_context_tokens=files.max_context_tokens,
        )
        spec = _spec(files, model, share_of(loaded))
        return cls(model, HostStepper(model, files.eos_token_ids, draws=draws), spec)

    @property
    def looks_ahead(self) -> bool:
        return self._stepper.looks_ahead

    async def step(self, batch: StepBatch) -> StepResult:
        """Run the batch in the engine's thread. A cancelled call raises once the step is over."""
        if not self.looks_ahead:
            return await run_to_end(lambda is_cancelled: self.compute(batch), self._thread)
        has_room = self._num_under_way < MAX_UNDER_WAY
        check_invariant(has_room, "one step is taken ahead", self._num_under_way)
        self._num_under_way += 1
        try:
            begun = self._thread.submit(self._begin, batch)  # in the order of calls, as the waits
            return await run_to_end(lambda is_cancelled: self._end(begun.result()), self._waiter)
        finally:
            self._num_under_way -= 1

    def compute(self, batch: StepBatch) -> StepResult:
        """Run the batch in the calling thread; not while a `step` is running."""
        return self._end(self._begin(batch))

    def _begin(self, batch: StepBatch) -> "_Begun":
        began_s = time.perf_counter()
        return _Begun(batch, began_s, self._stepper.submit(batch) if batch.sequences else None)

    def _end(self, begun: "_Begun") -> StepResult:
        """A step that waited behind another one has taken the time since that one's end."""
        if begun.submitted is None:
            return StepResult((), 0.0)
        found, path = begun.submitted.wait()
        drawn = iter(found)
        sampled: list[Drawn | None] = [
            None if each.sample is None else next(drawn, None) for each in begun.batch.sequences
        ]
        began_s, self._ended_s = max(begun.began_s, self._ended_s), time.perf_counter()
        return StepResult(tuple(sampled), self._ended_s - began_s, path)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._waiter.shutdown(wait=True)
        self._stepper.close()


@dataclass(frozen=True, slots=True)
class _Begun:
    batch: StepBatch
    began_s: float
    submitted: Submitted | None  # None: it has no sequences


def _use_one_thread() -> None:
    """More threads wait for each other on a busy machine, up to 300 times longer (facts 3.4)."""
    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of giving them back to the system.

    Otherwise each large intermediate result is mapped and cleared anew: SiLU of 512 x 1408 values
    takes 1.9 ms instead of 0.2. Elsewhere than on glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _spec(files: ModelFiles, model: PagedModel, share: RankShare | None) -> EngineSpec:
    own = model.kv.layout
    sharded = (
        ShardedLayout(whole=own)
        if share is None
        else share.sharded_layout(block_size=own.block_size, dtype=own.dtype)
    )
    return EngineSpec(
        kind="torch",
        model_name=files.name,
        model_hash=files.model_hash,
        tokenizer_hash=Tokenizer.load(files.model_dir).digest,
        vocab_size=files.vocab_size,
        max_context_tokens=files.max_context_tokens,
        eos_token_ids=files.eos_token_ids,
        layout=replace(sharded.whole, order=own.order),
        length_rule=model.length_rule,
        tp=sharded.tp,
        pp=sharded.pp,
    )
