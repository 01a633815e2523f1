"""The process of a decode worker: what its builder leaves to the place that it runs in."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import structlog

from decode_worker.building import open_decode_worker
from kvtransfer.transports import open_transports
from kvtransfer.transports.base import End, Transport
from kvtransfer.transports.faulty import FaultyTransport
from pdserve.config.processes import WorkerSettings
from pdserve.domain.ids import Epoch
from pdserve.engine.model_files import resolve_model_dir
from pdserve.engine.ranks.crew import PreparedRanks
from pdserve.engine.ranks.service import OpenRankService
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.prometheus import DecodeMetrics
from pdserve.rpc.links import connect_prefill, decode_service
from pdserve.rpc.process import OnReady
from pdserve.worker.parts import WorkerParts
from pdserve.worker.process import ServedRole, serve_worker

log = structlog.get_logger(__name__)


RANK_SERVICES: Sequence[OpenRankService] = ()
"""What ranks other than 0 do besides computing."""


async def serve(
    settings: WorkerSettings,
    on_ready: OnReady,
    stop: asyncio.Event,
    prepared: PreparedRanks | None = None,
) -> None:
    """Serve until `stop`, then finish what was taken on, for `drain_s` at most."""
    await serve_worker(settings, _open, on_ready, stop, prepared)


@contextlib.asynccontextmanager
async def _open(parts: WorkerParts) -> AsyncIterator[ServedRole]:
    settings = parts.settings
    metrics = DecodeMetrics(
        settings.worker_id,
        block_bytes=parts.engine.spec.layout.block_bytes,
        transports=settings.transports,
    )
    async with open_decode_worker(
        parts,
        _open_transports(settings, parts.epoch),
        tokenizer=Tokenizer.load(resolve_model_dir(settings.engine.model)),
        connect=connect_prefill,
        watch=metrics,
    ) as worker:
        yield ServedRole(
            service=worker.service,
            add=decode_service(worker.service.handle),
            work=worker.work,
            metrics=metrics,
        )


def _open_transports(settings: WorkerSettings, epoch: Epoch) -> tuple[Transport, ...]:
    transports = open_transports(
        settings.transports, settings.host, settings.kv_port, timers=settings.timers, end=End(epoch)
    )
    if settings.corrupt_kv_blocks == 0:
        return transports
    log.warning("drill.enabled", corrupt_kv_blocks=settings.corrupt_kv_blocks)
    return tuple(FaultyTransport(each, settings.corrupt_kv_blocks) for each in transports)
