"""How `pdserve down` reaches a `pdserve up` that runs elsewhere on the Ray cluster."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.ray.actors import StopFlag
from deploy.ray.connecting import NAMESPACE, connect, disconnect, find_gcs, this_node
from pdserve.cli.problems import ClusterFailed
from pdserve.domain.errors import LocalFault

PREFIX = "pdserve-up-"
GRACE_S = 30.0
"""A cluster may take this much longer to go than its drain limit."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    address: str
    elapsed_s: float


class StopRequest:
    """The driver's end: a named actor that lives as long as the driver does."""

    def __init__(self, address: str, drain_s: float) -> None:
        """Raises `ClusterFailed` where a cluster of this address is up already."""
        affinity = NodeAffinitySchedulingStrategy(this_node(), soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": affinity}
        try:
            self._flag: Any = (
                ray.remote(StopFlag)
                .options(name=PREFIX + address, namespace=NAMESPACE, **options)
                .remote(address, drain_s)
            )
        except ValueError:
            raise ClusterFailed(f"a cluster at {address} is up on this Ray cluster") from None

    async def wait(self) -> bool:
        """Until somebody asks for a stop; False where nobody can ask any more."""
        try:
            await self._flag.wait.remote()
        except RayError:
            return False
        return True

    def close(self) -> None:
        ray.kill(self._flag)


async def stop_cluster(ray_address: str | None, address: str | None) -> Stopped:
    """Have the `pdserve up` at `address`, or the only one, drain and go; waits until it has.

    Raises `LocalFault` where it is not clear which, and `ClusterFailed` where none is up or it
    stays.
    """
    gcs = find_gcs(ray_address) if not ray.is_initialized() else "this one"
    is_ours = await connect(ray_address)
    try:
        name = _choose(_names(), address, gcs)
        started = time.monotonic()
        limit_s = await _ask(name) + GRACE_S
        while name in _names():
            if time.monotonic() - started > limit_s:
                raise ClusterFailed(f"{name.removeprefix(PREFIX)} did not stop in {limit_s:g} s")
            await asyncio.sleep(POLL_S)
        return Stopped(
            address=name.removeprefix(PREFIX), elapsed_s=round(time.monotonic() - started, 3)
        )
    finally:
        if is_ours:
            disconnect()


async def _ask(name: str) -> float:
    """Returns the cluster's drain limit in seconds."""
    try:
        flag = ray.get_actor(name, namespace=NAMESPACE)
        _, drain_s = await flag.describe.remote()
        await flag.set.remote()
    except (RayError, ValueError):
        return 0.0  # it is going already
    return float(drain_s)


def _names() -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        each["name"]
        for each in found
        if each["namespace"] == NAMESPACE and each["name"].startswith(PREFIX)
    )


def _choose(names: list[str], address: str | None, gcs: str) -> str:
    listed = ", ".join(name.removeprefix(PREFIX) for name in names)
    if not names:
        raise ClusterFailed(f"no cluster of pdserve is up on the Ray cluster at {gcs}")
    if address is not None:
        if PREFIX + address not in names:
            raise LocalFault(f"no cluster is up at {address}; up: {listed}")
        return PREFIX + address
    if len(names) > 1:
        raise LocalFault(f"{len(names)} clusters are up: {listed}; name one by --address")
    return names[0]
