"""The driver's connection to a Ray cluster, and which of its nodes live.

Ray itself waits long and says little where a cluster is not there, and takes some 16 s to see that
a node is gone; so the cluster is asked before Ray connects, and nodes are asked by us.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable

import grpc
import ray
import ray._private.worker
from ray._private.state import available_resources_per_node
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from deploy.ray.placing import RayNode
from pdserve.cli.problems import ClusterFailed
from pdserve.domain.addresses import is_loopback, join_address, split_address
from pdserve.domain.errors import LocalFault
from pdserve.rpc.channels import DIRECT

NAMESPACE = "pdserve"
GCS_ANSWERS_S = 5.0
NODE_ANSWERS_S = 1.0
NOT_GROUPS = "bundle_group_"


async def connect(address: str | None) -> bool:
    """Join the cluster as a driver; returns False where this process is in one already.

    Raises `LocalFault` for an address that names no cluster and `ClusterFailed` for one that does
    not answer or does not take us.
    """
    if ray.is_initialized():
        return False
    gcs = find_gcs(address)
    await _check_gcs(gcs)
    # A node that is lost would fill stdout with pages of its raylet's log: we say it in a line.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        # In a thread: it blocks for seconds, and in the main one it would take SIGTERM for itself.
        await asyncio.to_thread(
            ray.init,
            address=gcs,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterFailed(
            f"cannot join the Ray cluster at {gcs}: {_line(error)}; is this a machine of the "
            "cluster? From others use `ray job submit`"
        ) from None
    return True


def disconnect() -> None:
    """Leave the cluster; Ray ends what this driver had there."""
    ray.shutdown()


def find_gcs(address: str | None) -> str:
    """host:port of the cluster's GCS; raises `LocalFault` where that is not clear."""
    given = address or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in given:
        raise LocalFault(
            f"{given}: expected host:port of the Ray head, such as 10.0.0.1:6379; to start from "
            "outside the cluster use `ray job submit`"
        )
    if given in ("auto", "local"):
        return _local_gcs()
    try:
        host, port = split_address(given)
    except ValueError as error:
        raise LocalFault(
            f"{error}; expected host:port of the Ray head, such as 10.0.0.1:6379"
        ) from None
    # Ray takes loopback for the address that its nodes know this machine by.
    known = ray.util.get_node_ip_address() if is_loopback(host) else host
    return join_address(known, port)


def _local_gcs() -> str:
    from ray._private.services import find_gcs_addresses

    found = sorted(find_gcs_addresses())
    if len(found) != 1:
        what = f"several Ray clusters run here: {', '.join(found)}" if found else "none runs here"
        raise LocalFault(
            f"no Ray cluster was named and {what}; name one with --ray-address HOST:PORT, or start "
            "one with `ray start --head`"
        )
    gcs: str = found[0]
    return gcs


async def _check_gcs(gcs: str) -> None:
    """Raise `ClusterFailed` unless a Ray of our version answers there."""
    async with grpc.aio.insecure_channel(gcs, options=DIRECT) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            reply = await stub.CheckAlive(
                gcs_service_pb2.CheckAliveRequest(), timeout=GCS_ANSWERS_S, wait_for_ready=False
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return  # Ray's own client has the token
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise ClusterFailed(f"what listens at {gcs} is no Ray head") from None
            raise ClusterFailed(
                f"no Ray cluster answers at {gcs}; start one with `ray start --head`, or name "
                "another with --ray-address"
            ) from None
    if reply.ray_version != ray.__version__:
        raise ClusterFailed(
            f"the Ray cluster at {gcs} runs Ray {reply.ray_version}, this is {ray.__version__}: "
            "install the same on all machines"
        )


def this_node() -> str:
    """Id of the node that the driver is on."""
    return str(ray.get_runtime_context().get_node_id())


def known_nodes() -> tuple[RayNode, ...]:
    """Nodes that Ray takes for alive; it may be late by many seconds."""
    free = available_resources_per_node()
    return tuple(
        RayNode(
            node_id=node["NodeID"],
            host=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            free=_kept(free.get(node["NodeID"], {})),
            total=_kept(node["Resources"]),
        )
        for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))
        if node["Alive"]
    )


async def living_nodes() -> tuple[RayNode, ...]:
    """Nodes whose raylets answer now."""
    nodes = await asyncio.to_thread(known_nodes)
    return await answering(nodes)


async def answering(nodes: Iterable[RayNode]) -> tuple[RayNode, ...]:
    nodes = tuple(nodes)
    lives = await asyncio.gather(*map(answers, nodes))
    return tuple(node for node, is_alive in zip(nodes, lives, strict=True) if is_alive)


async def answers(node: RayNode) -> bool:
    """Whether the node's raylet takes connections: it does for as long as it lives."""
    try:
        async with asyncio.timeout(NODE_ANSWERS_S):
            _, writer = await asyncio.open_connection(node.host, node.port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _kept(amounts: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in amounts.items() if not name.startswith(NOT_GROUPS)}


def _line(error: Exception) -> str:
    """Its first line: Ray's run to pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
