"""Builds one prefill worker, on whatever engine, clock and transports it is given."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from kvtransfer.leading import serving
from kvtransfer.transports.base import Transport
from pdserve.domain.waiting import DISCIPLINES
from pdserve.engine.block_pool import BlockPool
from pdserve.observe.watch import NO_PREFILL_WATCH, PrefillWatch
from pdserve.worker.parts import WorkerParts, running
from prefill_worker.prefill_loop import PrefillLoop
from prefill_worker.service import PrefillService


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWorker:
    """A worker at work; `work` is its loop."""

    service: PrefillService
    loop: PrefillLoop
    pool: BlockPool
    work: asyncio.Task[None]


@contextlib.asynccontextmanager
async def open_prefill_worker(
    parts: WorkerParts,
    transports: Sequence[Transport],
    *,
    watch: PrefillWatch = NO_PREFILL_WATCH,
) -> AsyncIterator[PrefillWorker]:
    """A worker that reads prompts until the block ends."""
    settings, engine, timers = parts.settings, parts.engine, parts.settings.timers
    pool = parts.new_pool()
    loop = PrefillLoop(
        engine,
        pool,
        coefficients=parts.coefficients,
        max_step_tokens=settings.max_step_tokens,
        max_num_active=settings.max_num_requests,
        max_num_queued=settings.max_num_queued,
        discipline=DISCIPLINES[settings.queue_order or "deadline"],
        lease_s=timers.lease_s,
        overlap=settings.overlap,
        clock=parts.clock,
        watch=watch,
    )
    async with contextlib.AsyncExitStack() as stack:
        regions = await stack.enter_async_context(
            serving(engine.kv, transports, loop.senders.may_read, epoch=parts.epoch)
        )
        service = PrefillService(
            loop,
            parts.handoff_hello(regions),
            engine.spec,
            num_blocks=pool.num_blocks,
            queue_s=timers.queue_s,
            hello_s=timers.connect_s,
            clock=parts.clock,
            watch=watch,
        )
        work = await stack.enter_async_context(running(loop.run()))
        yield PrefillWorker(service=service, loop=loop, pool=pool, work=work)
