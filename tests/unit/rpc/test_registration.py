"""A worker's reports when its router takes none."""

import asyncio
from random import Random
from typing import Any

from deploy.simulated.virtual_time import run_virtual
from pdserve.config.timers import Timers
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.messages import RegisterReply, WorkerHello
from pdserve.rpc.registration import Registration
from pdserve.rpc.streams import MemoryStream, memory_stream_pair
from tests.unit.router.builders import make_hello, make_load

REPLY = RegisterReply(
    router_id="r", epoch=Epoch(1), protocol_version=PROTOCOL_VERSION, heartbeat_s=0.5
)


def test_worker_whose_reports_are_not_read_registers_again() -> None:
    """Else it waits for ever to send a report that is old, and is dead for that router."""

    async def run() -> None:
        routers: list[MemoryStream[Any, Any]] = []
        has_come_back = asyncio.Event()

        async def connect(address: str, timers: Timers) -> MemoryStream[Any, Any]:
            ours, theirs = memory_stream_pair("worker", "router")
            theirs.try_send(REPLY)
            routers.append(theirs)
            if len(routers) == 2:
                has_come_back.set()
            return ours

        registering = Registration(connect, "r:1", make_hello("w"), make_load, Timers(), Random(1))
        task = asyncio.create_task(registering.run())
        async with asyncio.timeout(3600):
            await has_come_back.wait()
        await asyncio.sleep(0.1)
        assert routers[0].is_over
        assert registering.is_registered
        assert isinstance(await routers[1].receive(), WorkerHello)
        task.cancel()
        await asyncio.wait([task])

    run_virtual(run())
