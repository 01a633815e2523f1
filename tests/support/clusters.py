"""A whole cluster in this process: the real apps over real gRPC on loopback, one task each."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pdserve.client.admin import AdminClient
from pdserve.config.base import Settings
from pdserve.config.processes import EngineSettings, LogLevel, RouterSettings, WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import ClusterState, WorkerState
from pdserve.observe.logging import configure_logging

START_S = 60.0
QUICK_TIMERS = Timers(
    heartbeat_s=0.1,
    suspect_s=10.0,
    dead_s=20.0,
    keepalive_s=10.0,
    keepalive_timeout_s=10.0,
    connect_s=10.0,
    drain_s=5.0,
)
"""All processes of these clusters share one thread: none may be called dead for being slow."""

ANY_COEFFICIENTS = {"fixed_s": 2e-4, "prefill_token_s": 1e-6, "decode_token_s": 1e-5}
"""Given, so that no cluster of a test spends time on measuring them."""

S = TypeVar("S", bound=Settings)
Serve = Callable[[S, Callable[..., None], asyncio.Event], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCluster:
    public_address: str
    internal_address: str

    async def state(self) -> ClusterState:
        async with AdminClient(self.internal_address) as admin:
            return await admin.cluster_state()

    async def idle_state(self) -> ClusterState:
        """The state once every worker has reported, after this call, that nothing is in use.

        Raises `TimeoutError` if that does not come.
        """
        reported = {worker.hello.worker_id: worker.load.sequence for worker in await self.workers()}
        async with asyncio.timeout(10):
            while True:
                state = await self.state()
                # The next report may have been made before the call; the one after it was not.
                is_fresh = all(
                    worker.load.sequence >= reported[worker.hello.worker_id] + 2
                    for worker in state.workers
                )
                is_idle = all(worker.load.kv.is_idle for worker in state.workers)
                if is_fresh and is_idle and state.num_in_flight == 0:
                    return state
                await asyncio.sleep(QUICK_TIMERS.heartbeat_s / 2)

    async def workers(self) -> tuple[WorkerState, ...]:
        return (await self.state()).workers


@contextlib.asynccontextmanager
async def task_cluster(
    *,
    prefill: int = 1,
    decode: int = 1,
    engine: EngineSettings | None = None,
    prefill_changes: dict[str, Any] | None = None,
    decode_changes: dict[str, Any] | None = None,
    engines: Sequence[EngineSettings] = (),
    log_level: LogLevel = "error",
) -> AsyncIterator[TaskCluster]:
    """Run `prefill` and `decode` workers and a router; all drained when the block ends.

    The workers of a pool have `engines` in turn, if any are given, else all have `engine`.
    """
    # Here, so that tests of torch-free parts can import this module.
    from decode_worker.app import serve as serve_decode
    from prefill_worker.app import serve as serve_prefill
    from router.app import serve as serve_router

    engines = engines or [engine or demo_engine()]
    configure_logging(level=log_level)
    async with contextlib.AsyncExitStack() as stack:
        router = RouterSettings(
            port=0,
            internal_port=0,
            model=engines[0].model,
            timers=QUICK_TIMERS,
            log_level=log_level,
        )
        addresses = await stack.enter_async_context(_running(serve_router, router))
        pools: list[tuple[str, int, Serve[WorkerSettings], dict[str, Any]]] = [
            ("prefill", prefill, serve_prefill, prefill_changes or {}),
            ("decode", decode, serve_decode, decode_changes or {}),
        ]
        for role, count, serve, changes in pools:
            for index in range(count):
                fields = {
                    "role": role,
                    "worker_id": f"{role}-{index}",
                    "routers": (addresses["internal_address"],),
                    "engine": engines[index % len(engines)],
                    "timers": QUICK_TIMERS,
                    "log_level": log_level,
                }
                settings = WorkerSettings.model_validate({**fields, **changes})
                await stack.enter_async_context(_running(serve, settings))
        cluster = TaskCluster(
            public_address=addresses["address"], internal_address=addresses["internal_address"]
        )
        await _wait_for_workers(cluster, prefill + decode)
        yield cluster


def demo_engine(**changes: Any) -> EngineSettings:
    fields = {"model": "demo", "num_blocks": 512, "coefficients": ANY_COEFFICIENTS}
    return EngineSettings.model_validate({**fields, **changes})


def timed_engine(coefficients: StepCoefficients | None = None, **changes: Any) -> EngineSettings:
    given = ANY_COEFFICIENTS
    if coefficients is not None:
        given = {
            name: getattr(coefficients, name) for name in StepCoefficients.__dataclass_fields__
        }
    return demo_engine(engine="timed", coefficients=given, **changes)


@contextlib.asynccontextmanager
async def _running(serve: Serve[S], settings: S) -> AsyncIterator[dict[str, str]]:
    stop = asyncio.Event()
    ready: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(
        serve(settings, lambda **addresses: ready.set_result(addresses), stop)
    )
    try:
        task.add_done_callback(lambda _: ready.done() or ready.cancel())
        async with asyncio.timeout(START_S):
            await asyncio.wait([ready])
        if task.done():
            task.result()
        yield await ready
    finally:
        stop.set()
        await asyncio.wait([task])
    task.result()


async def _wait_for_workers(cluster: TaskCluster, count: int) -> None:
    async with asyncio.timeout(START_S):
        alive = ["alive"] * count
        while [each.health for each in (await cluster.state()).workers] != alive:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
