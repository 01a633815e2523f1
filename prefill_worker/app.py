"""Builds one prefill worker from its settings and runs it until told to stop."""

import asyncio
import contextlib
import time

import structlog

from kvtransfer.session import TERMINAL, Phase
from kvtransfer.transports import open_transports
from kvtransfer.transports.base import End
from pdserve.config.processes import WorkerSettings
from pdserve.domain.ids import PROTOCOL_VERSION, WorkerId
from pdserve.domain.messages import HandoffHello
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.calibration import measure_coefficients
from pdserve.engine.opening import open_engine
from pdserve.engine.watched import WatchedEngine
from pdserve.observe.exposition import serve_metrics
from pdserve.observe.prometheus import PrefillMetrics
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES
from pdserve.rpc.links import prefill_service
from pdserve.rpc.process import OnReady
from pdserve.rpc.server import RpcServer
from pdserve.rpc.worker_process import (
    draw_epoch,
    end_task,
    pin_to_cpus,
    registered,
    run_until,
    worker_hello,
)
from prefill_worker.prefill_loop import PrefillLoop
from prefill_worker.service import PrefillService

log = structlog.get_logger(__name__)

_ENDS = TERMINAL - {Phase.REFUSED}  # what is refused was never a handoff here


async def serve(settings: WorkerSettings, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Serve until `stop`, then finish what was taken on, for `drain_s` at most."""
    structlog.contextvars.bind_contextvars(worker_id=settings.worker_id)
    pin_to_cpus(settings.cpus)
    clock = time.monotonic  # the event loop's own counts whole milliseconds
    timers = settings.timers
    epoch = draw_epoch()
    async with contextlib.AsyncExitStack() as stack:
        engine = WatchedEngine(open_engine(settings.engine), clock)
        stack.callback(engine.close)
        coefficients = await measure_coefficients(engine, settings.engine.coefficients)
        metrics = PrefillMetrics(
            settings.worker_id,
            block_bytes=engine.spec.layout.block_bytes,
            outcomes=[phase.name.lower() for phase in Phase if phase in _ENDS],
        )
        pool = BlockPool(
            settings.engine.num_blocks,
            reuse_prefixes=settings.engine.prefix_reuse,
            is_sound=engine.kv.is_sound,
        )
        loop = PrefillLoop(
            engine,
            pool,
            coefficients=coefficients,
            max_step_tokens=settings.max_step_tokens,
            max_num_active=settings.max_num_requests,
            max_num_waiting=settings.max_num_waiting,
            lease_s=timers.lease_s,
            clock=clock,
            watch=metrics,
        )
        regions = []
        transports = open_transports(
            settings.transports, settings.host, settings.kv_port, timers=timers, end=End(epoch)
        )
        for transport in transports:
            region_server = await transport.serve(engine.kv, loop.senders.may_read)
            stack.push_async_callback(region_server.close)
            regions.append(region_server.region)
        hello = HandoffHello(
            worker_id=WorkerId(settings.worker_id),
            epoch=epoch,
            protocol_version=PROTOCOL_VERSION,
            model_hash=engine.spec.model_hash,
            layout_hash=engine.spec.layout.digest(),
            regions=tuple(regions),
        )
        service = PrefillService(
            loop,
            hello,
            engine.spec,
            num_blocks=settings.engine.num_blocks,
            queue_s=timers.queue_s,
            hello_s=timers.connect_s,
            clock=clock,
            watch=metrics,
        )
        metrics.coefficients = coefficients
        metrics.now = lambda: loop.load(0, is_draining=service.is_draining)
        metrics.num_open_handoffs = lambda: len(loop.senders)
        metrics_address = await stack.enter_async_context(
            serve_metrics(metrics, settings.host, settings.metrics_port)
        )
        server = await RpcServer.start(
            settings.host,
            settings.port,
            [prefill_service(service.handle)],
            timers,
            max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
            is_ready=False,
        )
        server.health.live_while = lambda: engine.step_age_s < timers.stuck_s
        stack.push_async_callback(server.close)
        reading = asyncio.create_task(loop.run())
        stack.push_async_callback(end_task, reading)
        membership = worker_hello(
            settings, engine.spec, coefficients, epoch=epoch, address=server.address
        )
        registrations = await stack.enter_async_context(
            registered(
                settings,
                membership,
                lambda sequence: loop.load(sequence, is_draining=service.is_draining),
            )
        )
        server.health.ready_while = lambda: registrations.is_registered
        await server.set_ready(True)
        log.info("worker.ready", role=settings.role, address=server.address, epoch=epoch)
        on_ready(
            address=server.address,
            internal_address=server.address,
            metrics_address=metrics_address,
        )
        await run_until(stop, reading, registrations.refused)
        service.is_draining = True
        registrations.report_now()
        await server.set_ready(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timers.drain_s):
                await loop.wait_idle()
        log.info("worker.drained", is_idle=loop.is_idle)
