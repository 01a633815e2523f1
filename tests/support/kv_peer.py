"""A process that serves KV memory. Blocks in the last quarter are not on offer.

Peers begin as forks of one process that has imported what they need, torch above all.
"""

import asyncio
import multiprocessing
import os
import signal
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from kvtransfer.transports import open_transports
from pdserve.config.timers import Timers
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.digest import word_sums
from tests.support.kv_handoff import kv_memory, only

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


def start_fork_server() -> None:
    """So that it belongs to no test: it has descriptors in this process."""
    process = _context.Process(target=int)
    process.start()
    process.join()
    process.close()
