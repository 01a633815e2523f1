"""Builds one decode worker from its settings and runs it until told to stop."""

import asyncio
import contextlib
import time

import structlog

from decode_worker.decode_loop import DecodeLoop
from decode_worker.handoff import Handoffs
from decode_worker.intake import Intake
from decode_worker.prefill_links import PrefillLinks
from decode_worker.service import DecodeService
from kvtransfer.transports import open_transports
from kvtransfer.transports.base import End, Transport
from kvtransfer.transports.faulty import FaultyTransport
from pdserve.config.processes import WorkerSettings
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, WorkerId
from pdserve.domain.messages import HandoffHello, PeerHello
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.calibration import measure_coefficients
from pdserve.engine.model_files import resolve_model_dir
from pdserve.engine.opening import open_engine
from pdserve.engine.tokenizer import Tokenizer
from pdserve.engine.watched import WatchedEngine
from pdserve.observe.exposition import serve_metrics
from pdserve.observe.prometheus import DecodeMetrics
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES
from pdserve.rpc.links import connect_prefill, decode_service
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

log = structlog.get_logger(__name__)


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
        spec = engine.spec
        pool = BlockPool(
            settings.engine.num_blocks,
            reuse_prefixes=settings.engine.prefix_reuse,
            is_sound=engine.kv.is_sound,
        )
        metrics = DecodeMetrics(
            settings.worker_id,
            block_bytes=spec.layout.block_bytes,
            transports=settings.transports,
        )
        transports = _open_transports(settings, epoch)
        for transport in transports:
            stack.push_async_callback(transport.close)
            await transport.register(engine.kv)
        links = PrefillLinks(
            lambda address: connect_prefill(address, timers),
            HandoffHello(
                worker_id=WorkerId(settings.worker_id),
                epoch=epoch,
                protocol_version=PROTOCOL_VERSION,
                model_hash=spec.model_hash,
                layout_hash=spec.layout.digest(),
            ),
            transports,
            timers,
            metrics,
        )
        await stack.enter_async_context(links)
        decode_loop = DecodeLoop(
            engine,
            coefficients=coefficients,
            max_step_tokens=settings.max_step_tokens,
            clock=clock,
            watch=metrics,
        )
        service = DecodeService(
            hello=PeerHello(
                peer_id=settings.worker_id, epoch=epoch, protocol_version=PROTOCOL_VERSION
            ),
            spec=spec,
            tokenizer=Tokenizer.load(resolve_model_dir(settings.engine.model)),
            pool=pool,
            intake=Intake(
                pool,
                block_size=spec.layout.block_size,
                max_num_requests=settings.max_num_requests,
                max_num_waiting=settings.max_num_waiting,
                queue_s=timers.queue_s,
                clock=clock,
            ),
            handoffs=Handoffs(
                links, engine.kv, vocab_size=spec.vocab_size, clock=clock, watch=metrics
            ),
            decode_loop=decode_loop,
            max_local_prefill_tokens=settings.max_local_prefill_tokens,
            hello_s=timers.connect_s,
            clock=clock,
            watch=metrics,
        )
        metrics.coefficients = coefficients
        metrics.now = lambda: service.load(0)
        metrics_address = await stack.enter_async_context(
            serve_metrics(metrics, settings.host, settings.metrics_port)
        )
        server = await RpcServer.start(
            settings.host,
            settings.port,
            [decode_service(service.handle)],
            timers,
            max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
            is_ready=False,
        )
        server.health.live_while = lambda: engine.step_age_s < timers.stuck_s
        stack.push_async_callback(server.close)
        decoding = asyncio.create_task(decode_loop.run())
        stack.push_async_callback(end_task, decoding)
        hello = worker_hello(settings, spec, coefficients, epoch=epoch, address=server.address)
        registrations = await stack.enter_async_context(registered(settings, hello, service.load))
        server.health.ready_while = lambda: registrations.is_registered
        await server.set_ready(True)
        log.info("worker.ready", role=settings.role, address=server.address, epoch=epoch)
        on_ready(
            address=server.address,
            internal_address=server.address,
            metrics_address=metrics_address,
        )
        await run_until(stop, decoding, registrations.refused)
        service.is_draining = True
        registrations.report_now()
        await server.set_ready(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timers.drain_s):
                await service.wait_idle()
        await service.close()
        log.info("worker.drained")


def _open_transports(settings: WorkerSettings, epoch: Epoch) -> tuple[Transport, ...]:
    transports = open_transports(
        settings.transports, settings.host, settings.kv_port, timers=settings.timers, end=End(epoch)
    )
    if settings.corrupt_kv_blocks == 0:
        return transports
    log.warning("drill.enabled", corrupt_kv_blocks=settings.corrupt_kv_blocks)
    return tuple(FaultyTransport(each, settings.corrupt_kv_blocks) for each in transports)
