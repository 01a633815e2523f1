"""A process that serves KV memory: `python -m tests.support.kv_peer TRANSPORT BLOCKS BYTES SEED`.

Prints its region as one line of JSON. Blocks in the last quarter are not on offer. Ends with its
standard input.
"""

import asyncio
import json
import sys
from dataclasses import asdict

from kvtransfer.transports import open_transports
from pdserve.config.timers import Timers
from tests.support.kv_handoff import kv_memory, only


async def serve(transport_name: str, num_blocks: int, block_bytes: int, seed: int) -> None:
    (transport,) = open_transports([transport_name], "127.0.0.1", timers=Timers())
    with kv_memory(num_blocks, block_bytes, seed) as memory:
        server = await transport.serve(memory, only(range(num_blocks * 3 // 4)))
        print(json.dumps(asdict(server.region)), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.close()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], *map(int, sys.argv[2:])))
