"""The process of one worker: built from its settings, served over gRPC, drained at its end."""

import asyncio
import contextlib
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from pdserve.config.processes import WorkerSettings
from pdserve.domain.ids import Epoch
from pdserve.engine.calibration import measure_coefficients
from pdserve.engine.ranks.crew import PreparedRanks
from pdserve.engine.watched import WatchedEngine
from pdserve.observe.exposition import serve_metrics
from pdserve.observe.prometheus import DecodeMetrics, PrefillMetrics
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES
from pdserve.rpc.links import AddService, connect_membership
from pdserve.rpc.process import OnReady
from pdserve.rpc.router_names import RouterRegistrations
from pdserve.rpc.server import RpcServer
from pdserve.worker.parts import RoleService, WorkerParts, numbered_loads
from pdserve.worker.starting import opened_engine

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRole:
    """A built worker: its service and how gRPC adds it, its loop, and what counts its work.

    `work` never ends by itself.
    """

    service: RoleService
    add: AddService
    work: asyncio.Task[None]
    metrics: PrefillMetrics | DecodeMetrics


OpenRole = Callable[[WorkerParts], contextlib.AbstractAsyncContextManager[ServedRole]]


async def serve_worker(
    settings: WorkerSettings,
    open_role: OpenRole,
    on_ready: OnReady,
    stop: asyncio.Event,
    prepared: PreparedRanks | None = None,
) -> None:
    """Serve until `stop`, then finish what was taken on, for `drain_s` at most."""
    structlog.contextvars.bind_contextvars(worker_id=settings.worker_id)
    if (cpus := settings.cpus_of_rank(0)) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    clock = time.monotonic  # the event loop's own counts whole milliseconds
    timers = settings.timers
    async with contextlib.AsyncExitStack() as stack:
        opened = await stack.enter_async_context(opened_engine(settings, prepared, stop.set))
        engine = WatchedEngine(opened, clock)
        parts = WorkerParts(
            settings=settings,
            engine=engine,
            coefficients=await measure_coefficients(engine, settings.engine.coefficients),
            epoch=Epoch(secrets.randbits(63)),
            clock=clock,
        )
        role = await stack.enter_async_context(open_role(parts))
        service, metrics = role.service, role.metrics
        metrics.coefficients = parts.coefficients
        metrics.now = lambda: service.load(0)
        metrics_address = await stack.enter_async_context(
            serve_metrics(metrics, settings.host, settings.metrics_port)
        )
        server = await RpcServer.start(
            settings.host,
            settings.port,
            [role.add],
            timers,
            max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
            is_ready=False,
        )
        server.health.live_while = lambda: engine.step_age_s < timers.stuck_s
        stack.push_async_callback(server.close)
        registrations = RouterRegistrations(
            settings.routers,
            parts.hello(server.address),
            numbered_loads(service),
            timers,
            random.Random(parts.epoch),
            connect=connect_membership,
        )
        stack.push_async_callback(registrations.close)
        server.health.ready_while = lambda: registrations.is_registered
        await server.health.set_ready(True)
        log.info("worker.ready", role=settings.role, address=server.address, epoch=parts.epoch)
        on_ready(
            address=server.address,
            internal_address=server.address,
            metrics_address=metrics_address,
        )
        await _run_until(stop, role.work, registrations.refused)
        service.is_draining = True
        registrations.report_now()
        await server.health.set_ready(False)
        is_idle = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timers.drain_s):
                await service.wait_idle()
                is_idle = True
        await service.close()
        log.info("worker.drained", is_idle=is_idle)


async def _run_until(stop: asyncio.Event, *work: asyncio.Future[None]) -> None:
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
