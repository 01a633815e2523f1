"""A process that serves KV memory: `python -m tests.support.kv_peer TRANSPORT BLOCKS BYTES SEED`.

Prints its region as one line of JSON. Blocks in the last quarter are not on offer. Ends with its
standard input.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from kvtransfer.transports import open_transports
from pdserve.config.timers import Timers
from pdserve.domain.messages import RemoteRegion
from tests.support.kv_handoff import kv_memory, only

SEED = 20
BLOCK_BYTES = 4096
NUM_BLOCKS = 64  # of which the first 48 are on offer at a peer process


async def serve(transport_name: str, num_blocks: int, block_bytes: int, seed: int) -> None:
    (transport,) = open_transports([transport_name], "127.0.0.1", timers=Timers())
    with kv_memory(num_blocks, block_bytes, seed) as memory:
        server = await transport.serve(memory, only(range(num_blocks * 3 // 4)))
        print(json.dumps(asdict(server.region)), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.close()
    await transport.close()


@dataclass
class Peer:
    """A process that serves `NUM_BLOCKS` blocks of what `seed` says."""

    process: subprocess.Popen[bytes]
    region: RemoteRegion
    content: bytes

    def block(self, block_id: int) -> bytes:
        size = self.region.block_bytes
        return self.content[block_id * size : (block_id + 1) * size]

    async def kill(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


@asynccontextmanager
async def peer_process(
    name: str, num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES
) -> AsyncIterator[Peer]:
    process = subprocess.Popen(  # not asyncio's: the loop would keep descriptors of its own
        [
            *(sys.executable, "-m", "tests.support.kv_peer"),
            *(name, str(num_blocks), str(block_bytes), str(SEED)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with process:
        assert process.stdout is not None
        try:
            line = await asyncio.to_thread(process.stdout.readline)
            content = Random(SEED).randbytes(num_blocks * block_bytes)
            yield Peer(process, RemoteRegion(**json.loads(line)), content)
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], *map(int, sys.argv[2:])))
