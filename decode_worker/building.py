"""Builds one decode worker, on whatever engine, clock, transports and streams it is given."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from decode_worker.decode_loop import DecodeLoop
from decode_worker.handoff import Handoffs
from decode_worker.intake import Intake
from decode_worker.prefill_links import Connect, PrefillLinks
from decode_worker.service import DecodeService
from kvtransfer.leading import reading
from kvtransfer.paths import PathRules
from kvtransfer.transports.base import Transport
from pdserve.domain.ids import PROTOCOL_VERSION
from pdserve.domain.messages import PeerHello
from pdserve.domain.waiting import DISCIPLINES
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.watch import NO_DECODE_WATCH, DecodeWatch
from pdserve.worker.parts import WorkerParts, running


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorker:
    """A worker at work; `work` is its loop."""

    service: DecodeService
    loop: DecodeLoop
    pool: BlockPool
    intake: Intake
    handoffs: Handoffs
    links: PrefillLinks
    work: asyncio.Task[None]


@contextlib.asynccontextmanager
async def open_decode_worker(
    parts: WorkerParts,
    transports: Sequence[Transport],
    *,
    tokenizer: Tokenizer,
    connect: Connect,
    watch: DecodeWatch = NO_DECODE_WATCH,
) -> AsyncIterator[DecodeWorker]:
    """A worker that writes answers until the block ends; `connect` reaches prefill workers."""
    settings, engine, timers = parts.settings, parts.engine, parts.settings.timers
    spec = engine.spec
    pool = parts.new_pool()
    async with contextlib.AsyncExitStack() as stack:
        open_reader = await stack.enter_async_context(
            reading(
                engine.kv,
                spec.sharded_layout,
                transports,
                epoch=parts.epoch,
                read_s=timers.request_s,
                rules=PathRules(
                    avoid_s=timers.transport_retry_s, on_fallback=watch.transport_failed
                ),
            )
        )
        links = await stack.enter_async_context(
            PrefillLinks(connect, parts.handoff_hello(), open_reader, timers, watch)
        )
        loop = DecodeLoop(
            engine,
            coefficients=parts.coefficients,
            max_step_tokens=settings.max_step_tokens,
            clock=parts.clock,
            watch=watch,
        )
        intake = Intake(
            pool,
            block_size=spec.layout.block_size,
            max_num_requests=settings.max_num_requests,
            max_num_queued=settings.max_num_queued,
            discipline=DISCIPLINES[settings.queue_order or "fcfs"],
            queue_s=timers.queue_s,
            clock=parts.clock,
        )
        handoffs = Handoffs(
            links,
            block_size=spec.layout.block_size,
            vocab_size=spec.vocab_size,
            clock=parts.clock,
            watch=watch,
        )
        service = DecodeService(
            hello=PeerHello(
                peer_id=settings.worker_id, epoch=parts.epoch, protocol_version=PROTOCOL_VERSION
            ),
            spec=spec,
            tokenizer=tokenizer,
            pool=pool,
            intake=intake,
            handoffs=handoffs,
            decode_loop=loop,
            max_local_prefill_tokens=settings.max_local_prefill_tokens,
            hello_s=timers.connect_s,
            clock=parts.clock,
            watch=watch,
        )
        work = await stack.enter_async_context(running(loop.run()))
        yield DecodeWorker(
            service=service,
            loop=loop,
            pool=pool,
            intake=intake,
            handoffs=handoffs,
            links=links,
            work=work,
        )
