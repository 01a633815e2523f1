"""The router process: the only place that builds concrete objects."""

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random

import structlog

from pdserve.config.processes import RouterSettings
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.messages import ClusterState, PeerHello, Role
from pdserve.engine.model_files import resolve_model_dir
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.exposition import serve_metrics
from pdserve.observe.prometheus import RouterMetrics, RouterNow
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES, MAX_PUBLIC_MESSAGE_BYTES
from pdserve.rpc.links import connect_decode, membership_service
from pdserve.rpc.process import OnReady
from pdserve.rpc.server import RpcServer
from router.admission import TextLimits
from router.cluster_view import Health, Ledger
from router.dispatch import Dispatcher, DispatchLimits
from router.grpc_api import inference_service
from router.in_flight import InFlight
from router.membership import Membership
from router.rate_limit import RateLimit
from router.registrations import Registrations
from router.slo import SloBook, SloResult
from router.tokenizing import TextEncoder

log = structlog.get_logger(__name__)

DEFAULT_BURST_S = 10.0
"""Without `max_burst`, what `max_rate` lets in during this time may come at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A started router."""

    public: RpcServer
    internal: RpcServer
    metrics_address: str  # empty: no metrics
    dispatcher: Dispatcher
    membership: Membership
    ledger: Ledger
    in_flight: InFlight

    async def drain(self, drain_s: float) -> None:
        """Say that it is not ready, take nothing new, let what runs end."""
        await self.public.set_ready(False)
        await self.dispatcher.drain(drain_s)


async def serve(settings: RouterSettings, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Run a router until `stop`, then drain it."""
    structlog.contextvars.bind_contextvars(router_id=settings.router_id)
    async with open_router(settings) as router:
        on_ready(
            address=router.public.address,
            internal_address=router.internal.address,
            metrics_address=router.metrics_address,
        )
        await stop.wait()
        log.info("router.draining", num_in_flight=len(router.in_flight))
        await router.drain(settings.timers.drain_s)


@contextlib.asynccontextmanager
async def open_router(settings: RouterSettings) -> AsyncIterator[Router]:
    """Build and start a router; raises `LocalFault` for a model or a port that cannot be had."""
    model_dir = resolve_model_dir(settings.model)
    tokenizer = Tokenizer.load(model_dir)
    model_name = settings.model_name or Path(settings.model).name or model_dir.name
    rng = Random(secrets.randbits(128))
    clock = time.monotonic  # uvloop's own clock counts whole milliseconds
    ledger = Ledger()
    in_flight = InFlight(max_num_requests=settings.max_num_requests)
    membership = Membership(timers=settings.timers, ledger=ledger, tokenizer_hash=tokenizer.digest)
    slo = SloBook(settings.slo)
    metrics = _router_metrics(settings, slo)
    me = PeerHello(
        peer_id=settings.router_id,
        epoch=Epoch(rng.getrandbits(63)),
        protocol_version=PROTOCOL_VERSION,
    )
    registrations = Registrations(
        membership,
        me=me,
        connect=connect_decode,
        timers=settings.timers,
        clock=clock,
        rng=rng,
    )
    async with TextEncoder(tokenizer, model_dir) as encoder:
        dispatcher = Dispatcher(
            model_name=model_name,
            membership=membership,
            ledger=ledger,
            in_flight=in_flight,
            slo=slo,
            watch=metrics,
            encode=encoder.encode,
            timers=settings.timers,
            limits=DispatchLimits(
                max_num_waiting=settings.max_num_waiting,
                max_wait_s=settings.max_wait_s,
                rate=_rate_limit(settings),
                max_num_attempts=settings.max_num_attempts,
                text=TextLimits(
                    max_prompt_chars=settings.max_prompt_chars,
                    max_chars_per_token=tokenizer.max_chars_per_token(),
                ),
            ),
            clock=clock,
            rng=rng,
        )
        metrics.now = _router_now(membership, ledger, in_flight, clock)
        async with (
            serve_metrics(metrics, settings.host, settings.metrics_port) as metrics_address,
            await _start_public(settings, dispatcher) as public,
        ):
            public.health.ready_while = _once_it_can_serve(membership, clock)
            state = _cluster_state(
                ClusterState(
                    router_id=settings.router_id,
                    model_name=model_name,
                    public_address=public.address,
                    uptime_s=0.0,
                ),
                membership,
                ledger,
                in_flight,
                slo,
                clock,
            )
            async with await _start_internal(settings, registrations, state) as internal:
                yield Router(
                    public=public,
                    internal=internal,
                    metrics_address=metrics_address,
                    dispatcher=dispatcher,
                    membership=membership,
                    ledger=ledger,
                    in_flight=in_flight,
                )


async def _start_public(settings: RouterSettings, dispatcher: Dispatcher) -> RpcServer:
    return await RpcServer.start(
        settings.host,
        settings.port,
        [inference_service(dispatcher)],
        settings.timers,
        max_message_bytes=MAX_PUBLIC_MESSAGE_BYTES,
    )


async def _start_internal(
    settings: RouterSettings, registrations: Registrations, state: Callable[[], ClusterState]
) -> RpcServer:
    return await RpcServer.start(
        settings.host,
        settings.internal_port,
        [membership_service(registrations.serve, state)],
        settings.timers,
        max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
    )


def _once_it_can_serve(membership: Membership, clock: Callable[[], float]) -> Callable[[], bool]:
    """False until a decode worker is at hand: a router that has just come sends nobody away.

    True ever after: with no worker left clients need this router's word for it.
    """
    has_served = False

    def check() -> bool:
        nonlocal has_served
        has_served = has_served or any(
            worker.health is Health.ALIVE for worker in membership.view(clock()).decode
        )
        return has_served

    return check


def _rate_limit(settings: RouterSettings) -> RateLimit | None:
    if not settings.max_rate:
        return None
    burst = settings.max_burst or math.ceil(DEFAULT_BURST_S * settings.max_rate)
    return RateLimit(settings.max_rate, burst)


def _router_metrics(settings: RouterSettings, slo: SloBook) -> RouterMetrics:
    return RouterMetrics(
        settings.router_id,
        promises=slo.classes,
        slo_results=tuple(SloResult),
        worker_labels=tuple(product(Role, Health)),
    )


def _router_now(
    membership: Membership, ledger: Ledger, in_flight: InFlight, clock: Callable[[], float]
) -> Callable[[], RouterNow]:
    def now() -> RouterNow:
        view = membership.view(clock())
        return RouterNow(
            num_in_flight=len(in_flight),
            num_waiting=ledger.num_unread,
            workers=[
                (worker.hello.role, worker.health) for worker in (*view.prefill, *view.decode)
            ],
            is_draining=in_flight.is_draining,
        )

    return now


def _cluster_state(
    start: ClusterState,
    membership: Membership,
    ledger: Ledger,
    in_flight: InFlight,
    slo: SloBook,
    clock: Callable[[], float],
) -> Callable[[], ClusterState]:
    started_s = clock()

    def state() -> ClusterState:
        counts = in_flight.counts
        return replace(
            start,
            uptime_s=clock() - started_s,
            num_in_flight=len(in_flight),
            num_waiting=ledger.num_unread,
            num_completed=counts.completed,
            num_failed=counts.failed,
            num_cancelled=counts.cancelled,
            num_refused=counts.refused,
            workers=membership.worker_states(clock()),
            slo=slo.states(),
        )

    return state
