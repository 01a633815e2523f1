"""What ranks other than 0 do for the KV of their worker: read and serve what rank 0 tells them.

Each has transports of its own over its own part of the KV. Rank 0 says which peers there are and
which blocks to read, and knows which blocks are on offer.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import structlog

from kvtransfer.landing import Landing
from kvtransfer.paths import PathRules
from kvtransfer.reading import BlockRead, BlockReader, RankReaders
from kvtransfer.transports import worker_transports
from kvtransfer.transports.base import End
from pdserve.domain.errors import RankLost, TransferFailed
from pdserve.domain.ids import BlockId, Epoch
from pdserve.domain.layout import BlockOrder, ShardedLayout
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.ranks.channel import Handler
from pdserve.engine.ranks.frames import Message
from pdserve.engine.ranks.ranked_kv import (
    bytes_to_ints,
    handoff_fields,
    handoff_of,
    ints_to_bytes,
    kv_handlers,
    own_store,
    split,
)
from pdserve.engine.ranks.service import RankParts

log = structlog.get_logger(__name__)

BEGIN, OPEN, READ, CLOSE = "kv.begin", "kv.open", "kv.read", "kv.close"
MAY_READ = "kv.may_read"
"""Asked by a rank of rank 0; all others are asked by rank 0."""


@contextlib.asynccontextmanager
async def read_for_leader(parts: RankParts) -> AsyncIterator[Mapping[str, Handler]]:
    """For a decode worker: reads into this rank's blocks, until the block ends."""
    memory, layout = own_store(parts.engine.kv), parts.engine.spec.sharded_layout
    readers: RankReaders | None = None
    open_readers: dict[int, BlockReader] = {}
    async with contextlib.AsyncExitStack() as stack:

        async def begin(message: Message) -> None:
            nonlocal readers
            end = End(Epoch(message.fields["epoch"]), parts.place.rank)
            transports = worker_transports(parts.settings, end)
            for transport in transports:
                stack.push_async_callback(transport.close)
                await transport.register(memory)
            readers = RankReaders(
                memory,
                layout=layout,
                rank=end.rank,
                transports=transports,
                rules=PathRules(avoid_s=parts.settings.timers.transport_retry_s),
            )
            stack.callback(readers.close)

        async def open_reader(message: Message) -> Message:
            fields = message.fields
            source = peer_layout(fields, layout)
            regions = [RemoteRegion(**region) for region in fields["regions"]]
            reader = readers.open(source, regions) if readers else None
            if reader is None:
                return Message({"is_open": False})
            open_readers[fields["reader"]] = reader
            return Message(
                {
                    "is_open": True,
                    "num_blocks": reader.num_blocks,
                    "block_bytes": reader.block_bytes,
                }
            )

        async def read(message: Message) -> Message:
            reader = open_readers.get(message.fields["reader"])
            if reader is None:
                raise TransferFailed("the peer is gone")
            return Message({}, ints_to_bytes(sorted(await reader.read(read_of(message)))))

        async def close(message: Message) -> None:
            reader = open_readers.pop(message.fields["reader"], None)
            if reader is not None:
                await reader.close()

        handlers = {BEGIN: begin, OPEN: open_reader, READ: read, CLOSE: close}
        yield {**kv_handlers(memory), **handlers}


@contextlib.asynccontextmanager
async def serve_for_leader(parts: RankParts) -> AsyncIterator[Mapping[str, Handler]]:
    """For a prefill worker: lets peers read this rank's blocks, until the block ends."""
    memory = own_store(parts.engine.kv)

    async def may_read(block_ids: Sequence[BlockId]) -> bool:
        question = Message({}, ints_to_bytes(block_ids))
        deadline_s = parts.settings.timers.transfer_idle_s
        try:
            answer = await parts.channel.ask(MAY_READ, question, deadline_s=deadline_s)
        except RankLost as lost:
            log.warning("kv_read.refused", why=lost.message)
            return False
        return answer.fields["may_read"] is True

    async with contextlib.AsyncExitStack() as stack:

        async def begin(message: Message) -> Message:
            end = End(Epoch(message.fields["epoch"]), parts.place.rank)
            regions = []
            for transport in worker_transports(parts.settings, end):
                stack.push_async_callback(transport.close)
                server = await transport.serve(memory, may_read)
                stack.push_async_callback(server.close)
                regions.append(asdict(server.region))
            return Message({"regions": regions})

        yield {**kv_handlers(memory), BEGIN: begin}


def peer_fields(peer: ShardedLayout) -> dict[str, int | str]:
    """What a peer's layout has of its own; the rest is as in that of any of its pairs."""
    whole = peer.whole
    return {"tp": peer.tp, "pp": peer.pp, "block_size": whole.block_size, "order": whole.order}


def peer_layout(fields: Mapping[str, Any], own: ShardedLayout) -> ShardedLayout:
    order = BlockOrder(fields["order"])
    whole = replace(own.whole, block_size=fields["block_size"], order=order)
    return ShardedLayout(whole=whole, tp=fields["tp"], pp=fields["pp"])


def read_message(reader: int, blocks: BlockRead) -> Message:
    landing = blocks.landing.around(blocks.indices, blocks.block_size)
    fields: dict[str, int | str] = {
        "reader": reader,
        "num_blocks": len(blocks),
        "peer_block_size": blocks.block_size,
        "block_size": landing.block_size,
        "first_block": landing.first_block,
        "num_own_blocks": len(landing.blocks),
    }
    return Message(
        fields | handoff_fields(blocks.handoff),
        b"".join(
            (
                ints_to_bytes(blocks.indices, blocks.remote_blocks),
                ints_to_bytes(landing.blocks),
                *blocks.digests,
            )
        ),
    )


def read_of(message: Message) -> BlockRead:
    fields, body = message.fields, memoryview(message.body)
    count, num_own_blocks = int(fields["num_blocks"]), int(fields["num_own_blocks"])
    listed = len(ints_to_bytes(range(2 * count)))
    landed = listed + len(ints_to_bytes(range(num_own_blocks)))
    indices, remote_blocks = bytes_to_ints(body[:listed], 2)
    [own_blocks] = bytes_to_ints(body[listed:landed], 1)
    digests = body[landed:]
    return BlockRead(
        handoff=handoff_of(fields),
        block_size=int(fields["peer_block_size"]),
        indices=indices,
        remote_blocks=[BlockId(block) for block in remote_blocks],
        digests=split(digests, len(digests) // max(1, count)),
        landing=Landing(
            blocks=[BlockId(block) for block in own_blocks],
            first_block=int(fields["first_block"]),
            block_size=int(fields["block_size"]),
        ),
    )
