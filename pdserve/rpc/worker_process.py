"""What prefill and decode workers do alike around their service."""

import asyncio
import contextlib
import os
import random
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from pdserve.config.processes import WorkerSettings
from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, WorkerId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import WorkerHello, WorkerLoad
from pdserve.rpc.hardware import describe_hardware
from pdserve.rpc.router_names import RouterRegistrations


def draw_epoch() -> Epoch:
    return Epoch(secrets.randbits(63))


def pin_to_cpus(cpus: tuple[int, ...]) -> None:
    """Run on these CPUs only, where the system can do that; none means all."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def worker_hello(
    settings: WorkerSettings,
    spec: EngineSpec,
    coefficients: StepCoefficients,
    *,
    epoch: Epoch,
    address: str,
) -> WorkerHello:
    return WorkerHello(
        worker_id=WorkerId(settings.worker_id),
        role=settings.role,
        reads=settings.reads,
        num_stages=settings.engine.pp,
        epoch=epoch,
        protocol_version=PROTOCOL_VERSION,
        address=address,
        pid=os.getpid(),
        model_name=spec.model_name,
        model_hash=spec.model_hash,
        layout_hash=spec.layout.digest(),
        tokenizer_hash=spec.tokenizer_hash,
        max_context_tokens=spec.max_context_tokens,
        vocab_size=spec.vocab_size,
        block_size=spec.layout.block_size,
        num_blocks=settings.engine.num_blocks,
        block_bytes=spec.layout.block_bytes,
        max_num_requests=settings.max_num_requests,
        max_step_tokens=settings.max_step_tokens,
        engine=spec.kind,
        coefficients=coefficients,
        hardware=describe_hardware(settings.engine),
        is_measured=settings.engine.coefficients is None,
    )


@contextlib.asynccontextmanager
async def registered(
    settings: WorkerSettings, hello: WorkerHello, load: Callable[[int], WorkerLoad]
) -> AsyncIterator[RouterRegistrations]:
    """Stay registered with every router of the settings for as long as the block runs.

    `load` is given a sequence number that only grows.
    """
    sequence = 0

    def next_load() -> WorkerLoad:
        nonlocal sequence
        sequence += 1
        return load(sequence)

    registrations = RouterRegistrations(
        settings.routers, hello, next_load, settings.timers, random.Random(hello.epoch)
    )
    try:
        yield registrations
    finally:
        await registrations.close()


async def run_until(stop: asyncio.Event, *work: asyncio.Future[None]) -> None:
    """Wait for `stop`; if `work`, which never ends by itself, fails before, raise its error."""
    stopped = asyncio.create_task(stop.wait())
    ends: list[asyncio.Future[Any]] = [stopped, *work]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for each in work:
            if each.done():
                each.result()
    finally:
        stopped.cancel()


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is over, whatever its outcome."""
    task.cancel()
    await asyncio.wait([task])
