"""A router's side of membership, over the real service."""

import asyncio

from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.messages import ClusterState, RegisterReply, WorkerHello, WorkerLoad
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES
from pdserve.rpc.links import membership_service
from pdserve.rpc.server import RpcServer
from pdserve.rpc.streams import RegisterServerLink, iterate

TIMERS = Timers(connect_s=1.0, keepalive_s=0.5)


def cluster_state() -> ClusterState:
    return ClusterState(router_id="r", model_name="m", public_address="", uptime_s=0.0)


class Registry:
    """A router's side: notes hellos and loads, and replies as the test wants."""

    def __init__(self, heartbeat_s: float = 0.02) -> None:
        self.hellos: asyncio.Queue[WorkerHello] = asyncio.Queue()
        self.loads: asyncio.Queue[WorkerLoad] = asyncio.Queue()
        self.heartbeat_s = heartbeat_s
        self.cut = asyncio.Event()
        self.num_registered = 0
        self.refusal: PeerFault | None = None

    async def handle(self, stream: RegisterServerLink) -> None:
        hello = await stream.receive()
        assert isinstance(hello, WorkerHello)
        self.hellos.put_nowait(hello)
        if self.refusal is not None:
            raise self.refusal
        await stream.send(
            RegisterReply(
                router_id="r",
                epoch=Epoch(1),
                protocol_version=PROTOCOL_VERSION,
                heartbeat_s=self.heartbeat_s,
            )
        )
        self.num_registered += 1
        cut = asyncio.create_task(self.cut.wait())
        loads = asyncio.create_task(self._take_loads(stream))
        try:
            await asyncio.wait([loads, cut], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.num_registered -= 1
            loads.cancel()
            cut.cancel()

    async def _take_loads(self, stream: RegisterServerLink) -> None:
        async for load in iterate(stream):
            assert isinstance(load, WorkerLoad)
            self.loads.put_nowait(load)

    async def serve(self, port: int = 0) -> RpcServer:
        return await RpcServer.start(
            "127.0.0.1",
            port,
            [membership_service(self.handle, cluster_state)],
            TIMERS,
            max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
        )
