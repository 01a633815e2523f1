"""Waiting for a router to have its workers."""

import asyncio
import contextlib
from collections.abc import Set

from pdserve.client.admin import AdminClient
from pdserve.client.faults import ClusterUnreachable

POLL_S = 0.1


async def all_alive(internal_address: str, names: Set[str]) -> None:
    """Return once the router at `internal_address` calls all these workers alive."""
    async with AdminClient(internal_address) as admin:
        while True:
            with contextlib.suppress(ClusterUnreachable):
                state = await admin.cluster_state()
                alive = [each for each in state.workers if each.health == "alive"]
                if names <= {str(worker.hello.worker_id) for worker in alive}:
                    return
            await asyncio.sleep(POLL_S)
