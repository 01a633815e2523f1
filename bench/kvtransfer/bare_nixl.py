"""The same blocks by nixl itself: one READ into the blocks, by an agent that does nothing else.

It keeps its descriptors, as ours does, and may write into blocks whose read was given up, as ours
may not.
"""

import base64
import importlib
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from kvtransfer.transports.nixl_slots import Span
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import KvStore


def bare_nixl(
    region: RemoteRegion, target: KvStore, remote: Sequence[int], local: Sequence[int]
) -> Callable[[], Awaitable[None]]:
    """Reads when called. Our transport has loaded the library."""
    api = importlib.import_module("nixl_cu13._api")
    config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    agent = api.nixl_agent(f"bare-{id(target)}", config)
    ours, address = Span.of(target), region.address
    ours.register(agent)
    name = agent.add_remote_agent(base64.b64decode(address["metadata"]))
    size, num_bytes = region.block_bytes, region.num_blocks * region.block_bytes
    theirs = Span(ours.place, int(address["start"]), num_bytes)
    into = ours.prepare(agent, "", size)
    of = theirs.prepare(agent, name.decode() if isinstance(name, bytes) else name, size)
    places, wanted = (np.array(ids, dtype=np.int32) for ids in (local, remote))

    async def move() -> None:
        handle = agent.make_prepped_xfer("READ", into, places, of, wanted, b"")
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"nixl: {state}")
        handle.release()

    return move
