"""What a worker of either role is built from, and what it is once it is built. No gRPC here."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.config.processes import WorkerSettings
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, WorkerId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import (
    HandoffHello,
    RemoteRegion,
    WorkerHello,
    WorkerLoad,
)
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.contract import Engine
from pdserve.engine.hardware import describe_hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerParts:
    """Settings, and what they do not say. Whoever opened the engine closes it."""

    settings: WorkerSettings
    engine: Engine
    coefficients: StepCoefficients
    epoch: Epoch
    clock: Callable[[], float]

    def new_pool(self) -> BlockPool:
        return BlockPool(
            self.engine.kv.num_blocks,
            reuse_prefixes=self.settings.engine.prefix_reuse,
            are_sound=self.engine.kv.are_sound,
        )

    def hello(self, address: str) -> WorkerHello:
        """What routers are told; `address` is that of the worker's own service."""
        settings, spec = self.settings, self.engine.spec
        return WorkerHello(
            worker_id=WorkerId(settings.worker_id),
            role=settings.role,
            reads=settings.reads,
            num_stages=settings.engine.pp if spec.kind == "timed" else 1,  # one step at a time
            epoch=self.epoch,
            protocol_version=PROTOCOL_VERSION,
            address=address,
            pid=os.getpid(),
            model_name=spec.model_name,
            model_hash=spec.model_hash,
            layout=spec.sharded_layout,
            tokenizer_hash=spec.tokenizer_hash,
            max_context_tokens=spec.max_context_tokens,
            vocab_size=spec.vocab_size,
            block_size=spec.layout.block_size,
            num_blocks=self.engine.kv.num_blocks,
            block_bytes=spec.layout.block_bytes,
            max_num_requests=settings.max_num_requests,
            max_step_tokens=settings.max_step_tokens,
            engine=spec.kind,
            coefficients=self.coefficients,
            hardware=describe_hardware(settings.engine),
            is_measured=settings.engine.coefficients is None,
        )

    def handoff_hello(self, regions: Sequence[RemoteRegion] = ()) -> HandoffHello:
        """What workers of the other role are told."""
        return HandoffHello(
            worker_id=WorkerId(self.settings.worker_id),
            epoch=self.epoch,
            protocol_version=PROTOCOL_VERSION,
            model_hash=self.engine.spec.model_hash,
            layout=self.engine.spec.sharded_layout,
            regions=tuple(regions),
        )


class RoleService(Protocol):
    """What a worker of either role does for its peers."""

    is_draining: bool
    """Set, it takes nothing new."""

    async def handle(self, stream: Any) -> None:
        """Serve one peer until its stream ends."""
        ...

    def load(self, sequence: int) -> WorkerLoad: ...

    async def wait_idle(self) -> None:
        """Until nothing is left of what was taken on."""
        ...

    async def close(self) -> None:
        """End streams that must not be cut: their peers still have to hear what is queued."""
        ...


def numbered_loads(service: RoleService) -> Callable[[], WorkerLoad]:
    """The load at each call, for the routers of one life: they drop reports that are overtaken."""
    sequence = itertools.count(1)
    return lambda: service.load(next(sequence))


@contextlib.asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """`work` as a task that is over when the block ends, whatever its outcome."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
