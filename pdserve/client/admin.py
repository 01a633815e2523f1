"""The operators' view of a cluster."""

from typing import Self

import grpc

from pdserve.client.channel import open_channel
from pdserve.client.errors import error_from_call
from pdserve.domain.messages import ClusterState
from pdserve.rpc.membership_codec import cluster_from_proto
from pdserve.v1 import membership_pb2, membership_pb2_grpc


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
