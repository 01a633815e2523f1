"""The process of a prefill worker: what its builder leaves to the place that it runs in."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from kvtransfer.session import TERMINAL, Phase
from kvtransfer.transports import open_transports
from kvtransfer.transports.base import End
from pdserve.config.processes import WorkerSettings
from pdserve.engine.ranks.crew import PreparedRanks
from pdserve.engine.ranks.service import OpenRankService
from pdserve.observe.prometheus import PrefillMetrics
from pdserve.rpc.links import prefill_service
from pdserve.rpc.process import OnReady
from pdserve.worker.parts import WorkerParts
from pdserve.worker.process import ServedRole, serve_worker
from prefill_worker.building import open_prefill_worker

_ENDS = TERMINAL - {Phase.REFUSED}  # what is refused was never a handoff here


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
    metrics = PrefillMetrics(
        settings.worker_id,
        block_bytes=parts.engine.spec.layout.block_bytes,
        outcomes=[phase.name.lower() for phase in Phase if phase in _ENDS],
    )
    transports = open_transports(
        settings.transports,
        settings.host,
        settings.kv_port,
        timers=settings.timers,
        end=End(parts.epoch),
    )
    async with open_prefill_worker(parts, transports, watch=metrics) as worker:
        metrics.num_open_handoffs = lambda: len(worker.loop.senders)
        yield ServedRole(
            service=worker.service,
            add=prefill_service(worker.service.handle),
            work=worker.work,
            metrics=metrics,
        )
