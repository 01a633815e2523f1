"""The internal services as message streams: one function to connect and one to serve each."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc.aio

from pdserve.config.timers import Timers
from pdserve.domain.messages import ClusterState, RegisterReply
from pdserve.rpc import codec, membership_codec
from pdserve.rpc.alike import message_of, value_of
from pdserve.rpc.channels import open_channel
from pdserve.rpc.grpc_streams import ClientStream, serve_stream
from pdserve.rpc.streams import (
    DecodeLink,
    DecodeServerLink,
    PrefillLink,
    PrefillServerLink,
    RegisterLink,
    RegisterServerLink,
)
from pdserve.v1 import (
    decode_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    prefill_pb2_grpc,
)

AddService = Callable[[grpc.aio.Server], str]
"""Adds a service to a server and returns its full name."""


def added_by(add: Callable[[Any, Any], None], servicer: object, name: str) -> AddService:
    """By `add`, the generated function for services of this kind; `name` is the full one."""

    def add_to(server: grpc.aio.Server) -> str:
        add(servicer, server)
        return name

    return add_to


async def connect_decode(address: str, timers: Timers) -> DecodeLink:
    """Open the stream of a router to a decode worker; raises `WorkerLost`."""
    channel = open_channel(address, timers)
    stub = decode_pb2_grpc.DecodeStub(channel)  # type: ignore[no-untyped-call]
    return await ClientStream.open(
        channel,
        stub.Serve,
        connect_s=timers.connect_s,
        encode=codec.router_message_to_proto,
        decode=codec.decode_message_from_proto,
        num_tokens=codec.num_prompt_tokens,
        peer=f"decode worker at {address}",
    )


async def connect_prefill(address: str, timers: Timers) -> PrefillLink:
    """Open the stream of a decode worker to a prefill worker; raises `WorkerLost`."""
    channel = open_channel(address, timers)
    stub = prefill_pb2_grpc.PrefillStub(channel)  # type: ignore[no-untyped-call]
    return await ClientStream.open(
        channel,
        stub.Handoff,
        connect_s=timers.connect_s,
        encode=codec.to_prefill_proto,
        decode=codec.from_prefill_proto,
        num_tokens=codec.num_prompt_tokens,
        peer=f"prefill worker at {address}",
    )


async def connect_membership(address: str, timers: Timers) -> RegisterLink:
    """Open the stream of a worker to a router; raises `WorkerLost`."""
    channel = open_channel(address, timers)
    stub = membership_pb2_grpc.MembershipStub(channel)  # type: ignore[no-untyped-call]
    return await ClientStream.open(
        channel,
        stub.Register,
        connect_s=timers.connect_s,
        encode=membership_codec.report_to_proto,
        decode=partial(value_of, RegisterReply),
        peer=f"router at {address}",
    )


def decode_service(handler: Callable[[DecodeServerLink], Awaitable[None]]) -> AddService:
    """Serve `Decode`: `handler` runs once for each router's stream, cancelled when it is lost."""

    class Servicer(decode_pb2_grpc.DecodeServicer):
        async def Serve(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
            await serve_stream(
                context,
                handler,
                encode=codec.decode_message_to_proto,
                decode=codec.router_message_from_proto,
                num_tokens=codec.num_prompt_tokens,
            )

    add = decode_pb2_grpc.add_DecodeServicer_to_server
    return added_by(add, Servicer(), "pdserve.v1.Decode")


def prefill_service(handler: Callable[[PrefillServerLink], Awaitable[None]]) -> AddService:
    """Serve `Prefill`: `handler` runs once for each decode worker's stream."""

    class Servicer(prefill_pb2_grpc.PrefillServicer):
        async def Handoff(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
            await serve_stream(
                context,
                handler,
                encode=codec.to_decode_proto,
                decode=codec.from_decode_proto,
                num_tokens=codec.num_prompt_tokens,
            )

    add = prefill_pb2_grpc.add_PrefillServicer_to_server
    return added_by(add, Servicer(), "pdserve.v1.Prefill")


def membership_service(
    handler: Callable[[RegisterServerLink], Awaitable[None]],
    cluster_state: Callable[[], ClusterState],
) -> AddService:
    """Serve `Membership`: `handler` runs once for each worker's registration."""

    class Servicer(membership_pb2_grpc.MembershipServicer):
        async def Register(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
            await serve_stream(
                context,
                handler,
                encode=partial(message_of, membership_pb2.RegisterReply),
                decode=membership_codec.report_from_proto,
            )

        async def GetCluster(  # noqa: N802
            self, request: membership_pb2.GetClusterRequest, context: Any
        ) -> membership_pb2.ClusterState:
            return membership_codec.cluster_to_proto(cluster_state())

    add = membership_pb2_grpc.add_MembershipServicer_to_server
    return added_by(add, Servicer(), "pdserve.v1.Membership")
