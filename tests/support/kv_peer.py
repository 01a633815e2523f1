"""A process that serves KV memory. Blocks in the last quarter are not on offer.

Peers begin as forks of one process that has imported what they need, torch above all.
"""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from random import Random
from typing import Any

from kvtransfer.transports import open_transports
from pdserve.config.timers import Timers
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.digest import word_sums
from tests.support.kv_handoff import blocks, kv_memory, only

SEED = 20
BLOCK_BYTES = 4096
NUM_BLOCKS = 64  # of which the first 48 are on offer at a peer process

word_sums()  # compiled once, before the forks
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.kv_peer", "kvtransfer.transports.collective"])


class KvPeer:
    """Serves `num_blocks` blocks of what `seed` says, until `close`; `region` waits for it."""

    def __init__(self, transport: str, num_blocks: int, block_bytes: int, seed: int) -> None:
        self._pipe, theirs = _context.Pipe()
        self.process = _context.Process(
            target=_run, args=(theirs, transport, num_blocks, block_bytes, seed), daemon=True
        )
        self.process.start()
        theirs.close()

    def region(self) -> RemoteRegion:
        fields: dict[str, Any] = self._pipe.recv()
        return RemoteRegion(**fields)

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """It is gone when this returns."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        self.kill()
        self.process.close()
        self._pipe.close()


def _run(pipe: Connection, transport: str, num_blocks: int, block_bytes: int, seed: int) -> None:
    asyncio.run(_serve(pipe, transport, num_blocks, block_bytes, seed))


async def _serve(
    pipe: Connection, transport_name: str, num_blocks: int, block_bytes: int, seed: int
) -> None:
    (transport,) = open_transports([transport_name], "127.0.0.1", timers=Timers())
    with kv_memory(num_blocks, block_bytes, seed) as memory:
        server = await transport.serve(memory, only(range(num_blocks * 3 // 4)))
        pipe.send(asdict(server.region))
        await asyncio.Event().wait()


class KvReader:
    """Reads the first `num_blocks` blocks of a region, over and over, until `close`."""

    def __init__(self, region: RemoteRegion, num_blocks: int, timers: Timers) -> None:
        self._pipe, theirs = _context.Pipe()
        self.process = _context.Process(
            target=_run_reader, args=(theirs, asdict(region), num_blocks, timers), daemon=True
        )
        self.process.start()
        theirs.close()

    def has_begun(self) -> None:
        """Wait until the first read is over and the next ones follow."""
        self._pipe.recv()

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._pipe.close()


def _run_reader(pipe: Connection, region: dict[str, Any], num_blocks: int, timers: Timers) -> None:
    asyncio.run(_read_on(pipe, RemoteRegion(**region), num_blocks, timers))


async def _read_on(pipe: Connection, region: RemoteRegion, num_blocks: int, timers: Timers) -> None:
    (transport,) = open_transports([region.transport], "127.0.0.1", timers=timers)
    wanted = blocks(*range(num_blocks))
    with kv_memory(num_blocks, region.block_bytes) as memory:
        await transport.read(region, wanted, memory, wanted)
        pipe.send(None)
        while True:
            await transport.read(region, wanted, memory, wanted)


def start_fork_server() -> None:
    """So that it belongs to no test: it has descriptors in this process."""
    process = _context.Process(target=int)
    process.start()
    process.join()
    process.close()


@dataclass
class Peer:
    """A process that serves `NUM_BLOCKS` blocks of what `seed` says."""

    process: KvPeer
    region: RemoteRegion
    content: bytes

    def block(self, block_id: int) -> bytes:
        size = self.region.block_bytes
        return self.content[block_id * size : (block_id + 1) * size]

    async def kill(self) -> None:
        await asyncio.to_thread(self.process.kill)


@asynccontextmanager
async def peer_process(
    name: str, num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES
) -> AsyncIterator[Peer]:
    process = KvPeer(name, num_blocks, block_bytes, SEED)
    try:
        content = Random(SEED).randbytes(num_blocks * block_bytes)
        yield Peer(process, await asyncio.to_thread(process.region), content)
    finally:
        process.close()
