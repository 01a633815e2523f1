"""One rank of a worker that moves KV and computes nothing: `python -m deploy.link_check.rank`.

Lines of JSON come on its standard input and answer on its standard output; it ends with its input.
A rank of a prefill worker fills its memory, says where it can be read and what the digests are. One
of a decode worker reads what it is told of, as in service, and says how long that took.
"""

import asyncio
import contextlib
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kvtransfer.landing import Landing
from kvtransfer.reading import BlockRead, BlockReader, RankReaders
from kvtransfer.transports import worker_transports
from kvtransfer.transports.base import End, Transport
from pdserve.config.processes import WorkerSettings
from pdserve.domain.errors import PdserveError
from pdserve.domain.ids import BlockId, Epoch, HandoffId, RequestId
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.layout import BlockOrder, KvLayout, LayerKv, ShardedLayout
from pdserve.domain.messages import RemoteRegion, Role
from pdserve.engine.kv_memory import KvMemory
from pdserve.observe.logging import configure_logging

HANDOFF = HandoffId(RequestId("check-links"), 1, 0)
MAX_LINE_BYTES = 1 << 28
NUM_SINGLE_READS = 16
LEAST_S, MAX_NUM_ROUNDS = 0.3, 8
"""All blocks are read again until this time is over, or so often."""


def layout_fields(layout: ShardedLayout) -> dict[str, Any]:
    whole = layout.whole
    return {
        "layers": [asdict(layer) for layer in whole.layers],
        "block_size": whole.block_size,
        "dtype": whole.dtype,
        "item_bytes": whole.item_bytes,
        "order": whole.order,
        "tp": layout.tp,
        "pp": layout.pp,
    }


def layout_of(fields: Mapping[str, Any]) -> ShardedLayout:
    whole = KvLayout(
        layers=tuple(LayerKv(**layer) for layer in fields["layers"]),
        block_size=fields["block_size"],
        dtype=fields["dtype"],
        item_bytes=fields["item_bytes"],
        order=BlockOrder(fields["order"]),
    )
    return ShardedLayout(whole=whole, tp=fields["tp"], pp=fields["pp"])


def scattered(num_blocks: int) -> list[BlockId]:
    """All block ids, no two neighbours among them, as in a cache that has been in use for long."""
    half = num_blocks_for(num_blocks, 2)
    pairs = zip(range(half), range(half, 2 * half), strict=True)
    return [BlockId(block) for pair in pairs for block in pair if block < num_blocks]


async def serve(told: Mapping[str, Any], memory: KvMemory, transports: Sequence[Transport]) -> None:
    """Let anyone read `memory`, until the input ends."""
    pattern = os.urandom(min(memory.num_bytes, 1 << 20))
    memory.bytes[:] = (pattern * num_blocks_for(memory.num_bytes, len(pattern)))[: memory.num_bytes]
    table = scattered(memory.num_blocks)

    async def anyone(block_ids: Sequence[BlockId]) -> bool:
        return True

    async with contextlib.AsyncExitStack() as stack:
        regions = []
        for transport in transports:
            server = await transport.serve(memory, anyone)
            stack.push_async_callback(server.close)
            regions.append(asdict(server.region) | {"rank": told["rank"]})
        digests = await memory.digests(HANDOFF, range(len(table)), table)
        say({"regions": regions, "digests": [digest.hex() for digest in digests]})
        async for _ in lines():
            pass


async def read(told: Mapping[str, Any], memory: KvMemory, transports: Sequence[Transport]) -> None:
    """Measure each peer that comes on the input."""
    for transport in transports:
        await transport.register(memory)
    layout = layout_of(told["layout"])
    readers = RankReaders(memory, layout=layout, rank=told["rank"], transports=transports)
    say({"is_ready": True})
    try:
        async for peer in lines():
            try:
                say(await measure(readers, memory, peer))
            except PdserveError as error:
                say({"failure": error.message})
    finally:
        readers.close()


async def measure(
    readers: RankReaders, memory: KvMemory, peer: Mapping[str, Any]
) -> dict[str, Any]:
    source = layout_of(peer["layout"])
    reader = readers.open(source, [RemoteRegion(**region) for region in peer["regions"]])
    if reader is None:
        return {"failure": "no transport reaches it"}
    try:
        digests = [bytes.fromhex(digest) for digest in peer["digests"]]
        blocks = BlockRead(
            handoff=HANDOFF,
            block_size=source.whole.block_size,
            indices=range(len(digests)),
            remote_blocks=scattered(len(digests)),
            digests=digests,
            landing=Landing(
                blocks=scattered(memory.num_blocks),
                first_block=0,
                block_size=memory.layout.block_size,
            ),
        )
        return await timed_reads(reader, blocks)
    finally:
        await reader.close()


async def timed_reads(reader: BlockReader, blocks: BlockRead) -> dict[str, Any]:
    """Single blocks for the latency, then all of them."""
    clock = asyncio.get_running_loop().time
    corrupt, single_s = set[int](), []
    for place in range(NUM_SINGLE_READS):
        started_s = clock()
        corrupt |= await reader.read(blocks.part(place % len(blocks), 1))
        single_s.append(clock() - started_s)
    num_rounds, started_s = 0, clock()
    while num_rounds < MAX_NUM_ROUNDS and (elapsed_s := clock() - started_s) < LEAST_S:
        corrupt |= await reader.read(blocks)
        num_rounds += 1
    elapsed_s = clock() - started_s
    answer = {
        "transport": reader.path.transport_name,
        "why": reader.path.why,
        "latency_s": statistics.median(single_s),
        "num_bytes": num_rounds * len(blocks) * reader.block_bytes,
        "elapsed_s": elapsed_s,
    }
    wrong = f"{len(corrupt)} of {len(blocks)} blocks did not match their digests"
    return answer | ({"failure": wrong} if corrupt else {})


def say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


async def lines() -> AsyncIterator[dict[str, Any]]:
    """What comes on the standard input, until it ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield json.loads(line)


async def main() -> None:
    async for told in lines():
        settings = WorkerSettings.model_validate(told["settings"])
        if settings.cpus:
            os.sched_setaffinity(0, settings.cpus_of_rank(told["rank"]))
        held = layout_of(told["layout"]).rank(told["rank"])
        memory = KvMemory(held.layout, told["num_blocks"], holds_numbers=False)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(memory.close)
            transports = worker_transports(settings, End(Epoch(told["epoch"]), told["rank"]))
            for transport in transports:
                stack.push_async_callback(transport.close)
            act = serve if settings.role is Role.PREFILL else read
            await act(told, memory, transports)
        return


if __name__ == "__main__":
    configure_logging(level="error")
    asyncio.run(main())
