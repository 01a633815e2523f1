"""The operators' view of a cluster."""

import asyncio
import time
from typing import Self

import grpc

from pdserve.client.channel import open_channel
from pdserve.client.errors import error_from_call
from pdserve.domain.messages import ClusterState
from pdserve.rpc.membership_codec import cluster_from_proto
from pdserve.v1 import membership_pb2, membership_pb2_grpc

POLL_S = 0.1


class AdminClient:
    """Asks one router, at its internal address. Raises `PdserveError` and nothing else."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = open_channel(address)
        self._stub = membership_pb2_grpc.MembershipStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close(grace=None)

    async def cluster_state(self, *, timeout_s: float | None = 10.0) -> ClusterState:
        """Workers as the router sees them now, and what became of its requests."""
        request = membership_pb2.GetClusterRequest()
        try:
            return cluster_from_proto(await self._stub.GetCluster(request, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from None

    async def settled_state(self, within_s: float) -> ClusterState:
        """Once no worker holds a KV block, or when so much time is over.

        Workers report with their heartbeats, so the state lags behind the last answer.
        """
        deadline_s = time.monotonic() + within_s
        while (state := await self.cluster_state()).busy_workers:
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(POLL_S)
        return state
