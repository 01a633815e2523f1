"""How the ranks of other hosts come to rank 0: what they say, and why they may be sent away."""

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

from pdserve.config.processes import WorkerSettings
from pdserve.domain.addresses import split_address
from pdserve.domain.errors import LocalFault, RankLost
from pdserve.domain.ids import PROTOCOL_VERSION
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.ranks.channel import RankChannel
from pdserve.engine.ranks.frames import Message

JOIN_S = 600.0
"""All ranks of a worker are there within this time of each other: hosts may be slow to start."""
RETRY_S = 0.2
HELLO_S = 5.0
"""Who connects says within this time which rank he is."""


def plan_fields(settings: WorkerSettings, files: ModelFiles) -> dict[str, Any]:
    """What all ranks of a worker must agree on, by the names that people know."""
    engine = settings.engine
    return {
        "protocol version": PROTOCOL_VERSION,
        "worker_id": settings.worker_id,
        "model": files.model_hash.hex(),
        "engine": engine.engine,
        "tp": engine.tp,
        "pp": engine.pp,
        "ranks.per_node": settings.num_local_ranks,
        "dtype": engine.dtype,
        "device": engine.device,
        "block_size": engine.block_size,
        "block_order": engine.block_order,
        "num_blocks": engine.num_blocks,
    }


def check_plan(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise `LocalFault` with the first difference."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise LocalFault(
                f"not a rank of this worker: its {name} is {value}; got {theirs.get(name)}"
            )


async def join_leader(settings: WorkerSettings, plan: Mapping[str, Any], rank: int) -> RankChannel:
    """Connect to rank 0, which may start later; raises `LocalFault` if it refuses this rank."""
    assert settings.ranks.leader is not None
    host, port = split_address(settings.ranks.leader)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + JOIN_S
    while True:
        try:
            connection = await _connect(host, port, settings.timers.connect_s)
            break
        except OSError as error:
            if loop.time() > until_s:
                raise LocalFault(
                    f"ranks.leader: nothing listens at {settings.ranks.leader} for "
                    f"{JOIN_S:g} s: {error.strerror or 'no answer'}"
                ) from None
            await asyncio.sleep(RETRY_S)
    channel = await RankChannel.open(connection, "rank 0")
    try:
        await channel.ask("join", Message({**plan, "rank": rank}), deadline_s=HELLO_S)
    except RankLost as lost:
        await channel.close()
        raise LocalFault(f"ranks.leader: {settings.ranks.leader} is no worker: {lost}") from None
    except BaseException:
        await channel.close()
        raise
    return channel


async def _connect(host: str, port: int, within_s: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(within_s):
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, address)
        except BaseException:
            connection.close()
            raise
        return connection
