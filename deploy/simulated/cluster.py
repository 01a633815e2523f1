"""A deployment's router and workers in one process, by their own builders.

    requests ── Router ══ DecodeWorker ══ PrefillWorker       ══ streams of a MemoryNetwork
                  ╘═══ registrations ═══════════╛             KV by a MemoryTransport

Nothing here waits for sockets or processes, so that it runs on a `VirtualTimeLoop`: there messages
take no time, and what is left is the time of the engines' steps.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random

from decode_worker.building import DecodeWorker, open_decode_worker
from deploy.deployment import Deployment
from kvtransfer.transports.memory import MemoryTransport
from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.ids import Epoch
from pdserve.domain.messages import Role
from pdserve.engine.calibration import measure_coefficients
from pdserve.engine.contract import Engine
from pdserve.engine.model_files import resolve_model_dir
from pdserve.engine.opening import open_engine
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.watch import RouterWatch
from pdserve.rpc.memory_network import MemoryNetwork
from pdserve.rpc.registration import Registration
from pdserve.worker.parts import WorkerParts, numbered_loads, running
from prefill_worker.building import PrefillWorker, open_prefill_worker
from router.building import Router, build_router
from router.cluster_view import Health
from router.slo import SloBook

ROUTER = "router"
POLL_S = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCluster:
    """What runs; workers by their names, which are their addresses too."""

    router: Router
    prefill: dict[str, PrefillWorker]
    decode: dict[str, DecodeWorker]
    network: MemoryNetwork


@contextlib.asynccontextmanager
async def open_simulated_cluster(
    deployment: Deployment,
    *,
    seed: int = 0,
    open_engine: Callable[[EngineSettings], Engine] = open_engine,
) -> AsyncIterator[SimulatedCluster]:
    """Every worker is registered and linked when the block begins; all is over when it ends.

    Raises `TimeoutError` if that takes longer than the deployment's `start_s`.
    """
    settings, rng = deployment.router, Random(seed)
    tokenizer = Tokenizer.load(resolve_model_dir(settings.model))

    async def encode(text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async with contextlib.AsyncExitStack() as stack:
        network = await stack.enter_async_context(MemoryNetwork())
        router = build_router(
            settings,
            tokenizer=tokenizer,
            encode=encode,
            slo=SloBook(settings.slo),
            connect=network.connect,
            clock=asyncio.get_running_loop().time,
            rng=rng,
            watch=RouterWatch(),
        )
        network.listen(ROUTER, router.registrations.serve)
        cluster = SimulatedCluster(router=router, prefill={}, decode={}, network=network)
        transport = MemoryTransport()
        for placed in deployment.workers:
            engine = open_engine(placed.settings.engine)
            stack.callback(engine.close)
            parts = await _parts(placed.settings, engine, rng)
            name = placed.name
            worker: PrefillWorker | DecodeWorker
            if placed.settings.role is Role.PREFILL:
                worker = cluster.prefill[name] = await stack.enter_async_context(
                    open_prefill_worker(parts, [transport])
                )
            else:
                worker = cluster.decode[name] = await stack.enter_async_context(
                    open_decode_worker(
                        parts, [transport], tokenizer=tokenizer, connect=network.connect
                    )
                )
            network.listen(name, worker.service.handle)
            registering = _register(parts, worker, network, rng)
            await stack.enter_async_context(running(registering.run()))
        async with asyncio.timeout(deployment.start_s):
            while not _all_alive(router, len(deployment.workers)):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        yield cluster


async def _parts(settings: WorkerSettings, engine: Engine, rng: Random) -> WorkerParts:
    return WorkerParts(
        settings=settings,
        engine=engine,
        coefficients=await measure_coefficients(engine, settings.engine.coefficients),
        epoch=Epoch(rng.getrandbits(63)),
        clock=asyncio.get_running_loop().time,
    )


def _register(
    parts: WorkerParts, worker: PrefillWorker | DecodeWorker, network: MemoryNetwork, rng: Random
) -> Registration:
    hello = parts.hello(parts.settings.worker_id)
    return Registration(
        network.connect,
        ROUTER,
        hello,
        numbered_loads(worker.service),
        parts.settings.timers,
        rng,
    )


def _all_alive(router: Router, count: int) -> bool:
    view = router.membership.view(router.clock())
    alive = [each for each in (*view.prefill, *view.decode) if each.health is Health.ALIVE]
    return len(alive) == count
