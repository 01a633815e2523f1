"""What probes of orchestrators see: readiness, and liveness that tells stuck from busy."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from decode_worker.app import serve as serve_decode
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.config.processes import RouterSettings, WorkerSettings
from pdserve.engine.contract import StepBatch, StepResult
from pdserve.engine.timed_engine import TimedEngine
from pdserve.rpc.health import LIVENESS, READINESS
from pdserve.rpc.server import RpcServer
from router.app import open_router
from tests.support.clusters import QUICK_TIMERS, timed_engine
from tests.support.waiting import wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def check(address: str, service: str) -> Any:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return reply.status


async def becomes(address: str, service: str, status: Any) -> None:
    seen = [None]

    async def look() -> None:
        while seen[0] != status:
            seen[0] = await check(address, service)
            await asyncio.sleep(0.02)

    await asyncio.wait_for(look(), 20)


async def test_a_process_is_ready_and_live_until_it_says_otherwise() -> None:
    async with await RpcServer.start(
        "127.0.0.1", 0, [], QUICK_TIMERS, max_message_bytes=1000
    ) as it:
        assert await check(it.address, READINESS) == SERVING
        assert await check(it.address, LIVENESS) == SERVING
        it.health.live_while = lambda: False
        assert await check(it.address, READINESS) == SERVING
        assert await check(it.address, LIVENESS) == NOT_SERVING
        it.health.live_while = lambda: True
        await it.health.set_ready(False)
        assert await check(it.address, READINESS) == NOT_SERVING
        assert await check(it.address, LIVENESS) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(it.address, "no.such.service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_router_is_ready_from_its_first_decode_worker_on() -> None:
    settings = RouterSettings(port=0, internal_port=0, timers=QUICK_TIMERS, log_level="error")
    async with open_router(settings) as served:
        address = served.public.address
        assert await check(address, READINESS) == NOT_SERVING
        assert await check(address, LIVENESS) == SERVING
        stop = asyncio.Event()
        worker, _ = await _start_decode(stop, routers=(served.internal.address,))
        await becomes(address, READINESS, SERVING)
        stop.set()
        await worker
        await wait_until(
            lambda: not served.router.membership.view(0).decode,
            within_s=10,
            what="the worker is gone",
        )
        assert await check(address, READINESS) == SERVING


async def test_worker_is_ready_while_a_router_has_it() -> None:
    stop = asyncio.Event()
    settings = RouterSettings(port=0, internal_port=0, timers=QUICK_TIMERS, log_level="error")
    async with open_router(settings) as served:
        worker, address = await _start_decode(stop, routers=(served.internal.address,))
        await becomes(address, READINESS, SERVING)
    await becomes(address, READINESS, NOT_SERVING)
    assert await check(address, LIVENESS) == SERVING
    stop.set()
    await worker


async def test_worker_in_one_step_for_too_long_is_not_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_end = asyncio.Event()
    plain_step = TimedEngine.step

    async def held_step(engine: TimedEngine, batch: StepBatch) -> StepResult:
        await may_end.wait()
        return await plain_step(engine, batch)

    stop = asyncio.Event()
    settings = RouterSettings(port=0, internal_port=0, timers=QUICK_TIMERS, log_level="error")
    timers = QUICK_TIMERS.model_copy(update={"stuck_s": 0.2})
    async with open_router(settings) as served:
        worker, address = await _start_decode(
            stop, routers=(served.internal.address,), timers=timers
        )
        await becomes(served.public.address, READINESS, SERVING)
        assert await check(address, LIVENESS) == SERVING
        monkeypatch.setattr(TimedEngine, "step", held_step)
        async with InferenceClient(served.public.address) as client:
            answer = asyncio.create_task(client.complete("def", Sampling(max_tokens=4)))
            await becomes(address, LIVENESS, NOT_SERVING)
            assert await check(address, READINESS) == SERVING
            may_end.set()
            await answer
        await becomes(address, LIVENESS, SERVING)
        stop.set()
        await worker


async def _start_decode(
    stop: asyncio.Event, *, routers: tuple[str, ...], **changes: Any
) -> tuple[asyncio.Task[None], str]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    fields = {
        "role": "decode",
        "worker_id": "decode-0",
        "routers": routers,
        "engine": timed_engine(),
        "timers": QUICK_TIMERS,
        "log_level": "error",
    }
    settings = WorkerSettings.model_validate({**fields, **changes})
    task = asyncio.create_task(
        serve_decode(settings, lambda **said: ready.set_result(said["address"]), stop)
    )
    return task, await asyncio.wait_for(ready, 20)
