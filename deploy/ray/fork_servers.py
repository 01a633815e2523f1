"""The fork servers of all nodes, seen from the driver."""

import asyncio
import contextlib
import secrets
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.ray.actors import NodeActor
from deploy.ray.placing import RayNode

START_S = 60.0
CLOSE_S = 1.0


class ForkServers:
    """One for each node that asked for one; whoever made this closes it."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._names: dict[str, asyncio.Task[str]] = {}

    def prepare(self, node: RayNode) -> None:
        """Start the node's server, if it has none: it takes seconds."""
        if node.node_id in self._actors:
            return
        affinity = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        actor = ray.remote(NodeActor)
        self._actors[node.node_id] = actor.options(
            num_cpus=0, max_restarts=0, scheduling_strategy=affinity
        ).remote()
        self._names[node.node_id] = asyncio.create_task(self._start(node))

    async def on(self, node: RayNode) -> str:
        """Name of the node's server, once it forks; empty: workers start without one."""
        self.prepare(node)
        return await asyncio.shield(self._names[node.node_id])

    async def close(self) -> None:
        for name in self._names.values():
            name.cancel()
        await asyncio.gather(*map(_close, self._actors.values()))

    async def _start(self, node: RayNode) -> str:
        name = f"pdserve-fork-{secrets.token_hex(8)}"
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(START_S):
                if not await self._actors[node.node_id].start.remote(name):
                    return name
        return ""


async def _close(actor: Any) -> None:
    with contextlib.suppress(RayError, TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await actor.close.remote()
    ray.kill(actor)
