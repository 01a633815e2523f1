"""The process of a router: what its builder leaves to the place that it runs in."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import product
from random import Random

import structlog

from pdserve.config.processes import RouterSettings
from pdserve.domain.messages import Role
from pdserve.engine.model_files import resolve_model_dir
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.exposition import serve_metrics
from pdserve.observe.prometheus import RouterMetrics
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES, MAX_PUBLIC_MESSAGE_BYTES
from pdserve.rpc.links import connect_decode, membership_service
from pdserve.rpc.process import OnReady
from pdserve.rpc.server import RpcServer
from router.building import Router, build_router
from router.cluster_view import Health
from router.grpc_api import inference_service
from router.slo import SloBook, SloResult
from router.tokenizing import TextEncoder

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRouter:
    """A router and where it can be reached."""

    router: Router
    public: RpcServer
    internal: RpcServer
    metrics_address: str  # empty: no metrics

    async def drain(self, drain_s: float) -> None:
        """Say that it is not ready, take nothing new, let what runs end."""
        await self.public.health.set_ready(False)
        await self.router.dispatcher.drain(drain_s)


async def serve(settings: RouterSettings, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Run a router until `stop`, then drain it."""
    structlog.contextvars.bind_contextvars(router_id=settings.router_id)
    async with open_router(settings) as served:
        on_ready(
            address=served.public.address,
            internal_address=served.internal.address,
            metrics_address=served.metrics_address,
        )
        await stop.wait()
        log.info("router.draining", num_in_flight=len(served.router.in_flight))
        await served.drain(settings.timers.drain_s)


@contextlib.asynccontextmanager
async def open_router(settings: RouterSettings) -> AsyncIterator[ServedRouter]:
    """Build and start a router; raises `LocalFault` for a model or a port that cannot be had."""
    model_dir = resolve_model_dir(settings.model)
    tokenizer = Tokenizer.load(model_dir)
    slo = SloBook(settings.slo)
    metrics = _metrics(settings, slo)
    async with TextEncoder(tokenizer, model_dir) as encoder:
        router = build_router(
            settings,
            tokenizer=tokenizer,
            encode=encoder.encode,
            slo=slo,
            connect=connect_decode,
            clock=time.monotonic,  # uvloop's own clock counts whole milliseconds
            rng=Random(secrets.randbits(128)),
            watch=metrics,
        )
        metrics.now = router.now
        async with (
            serve_metrics(metrics, settings.host, settings.metrics_port) as metrics_address,
            await RpcServer.start(
                settings.host,
                settings.port,
                [inference_service(router.dispatcher)],
                settings.timers,
                max_message_bytes=MAX_PUBLIC_MESSAGE_BYTES,
            ) as public,
        ):
            public.health.ready_while = router.can_serve
            membership = membership_service(
                router.registrations.serve, lambda: router.state(public.address)
            )
            async with await RpcServer.start(
                settings.host,
                settings.internal_port,
                [membership],
                settings.timers,
                max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
            ) as internal:
                yield ServedRouter(
                    router=router,
                    public=public,
                    internal=internal,
                    metrics_address=metrics_address,
                )


def _metrics(settings: RouterSettings, slo: SloBook) -> RouterMetrics:
    return RouterMetrics(
        settings.router_id,
        promises=slo.classes,
        slo_results=tuple(SloResult),
        worker_labels=tuple(product(Role, Health)),
    )
