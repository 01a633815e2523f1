"""KV between workers whose blocks differ in size and order, at each of their ranks.

Real transports; random cases, each of which its seed names.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import pytest

from kvtransfer.following import read_for_leader, serve_for_leader
from kvtransfer.landing import Landing
from kvtransfer.leading import reading, serving
from kvtransfer.reading import BlockReader
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.transports import worker_transports
from kvtransfer.transports.base import End
from pdserve.domain.ids import BlockId
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.layout import BlockOrder, KvLayout
from pdserve.domain.messages import BlocksOffered, Role
from tests.support.kv_handoff import handoff_id
from tests.support.ranked_kv import (
    EPOCH,
    WHOLE,
    OnDevice,
    Planes,
    Ranks,
    block_of,
    prompt_kv,
    ranks_of,
)

DIVISIONS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]
SIZES = [1, 2, 3, 4, 5, 8, 16]
NUM_BLOCKS = 48
MAX_NUM_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a seed says of two workers and of a prompt."""

    source: tuple[int, int]
    target: tuple[int, int]
    source_whole: KvLayout
    target_whole: KvLayout
    transport: str
    is_on_device: bool
    num_tokens: int
    first_block: int
    num_corrupt: int


def case_of(rng: Random) -> Case:
    sizes = rng.choice(SIZES), rng.choice(SIZES)
    wholes = [replace(WHOLE, block_size=size, order=rng.choice(list(BlockOrder))) for size in sizes]
    num_tokens = rng.randint(1, MAX_NUM_TOKENS)
    return Case(
        source=rng.choice(DIVISIONS),
        target=rng.choice(DIVISIONS),
        source_whole=wholes[0],
        target_whole=wholes[1],
        transport=rng.choice(["shm", "tcp"]),
        is_on_device=rng.random() < 0.5,
        num_tokens=num_tokens,
        first_block=rng.randrange(num_blocks_for(num_tokens, sizes[1])),
        num_corrupt=rng.choice([0, 0, 1]),
    )


@dataclass(frozen=True, kw_only=True)
class Workers:
    source: Ranks
    target: Ranks
    reader: BlockReader
    planes: Planes
    table: tuple[BlockId, ...]  # of the prompt, at the source

    async def offer(self, first: int, count: int) -> BlocksOffered:
        block_ids = self.table[first : first + count]
        digests = await self.source.kv.digests(handoff_id(), range(first, first + count), block_ids)
        return BlocksOffered(
            handoff=handoff_id(),
            first_block=first,
            block_ids=block_ids,
            digests=tuple(digests),
        )


@contextlib.asynccontextmanager
async def workers_of(case: Case, rng: Random) -> AsyncIterator[Workers]:
    """All of the prompt is on offer; blocks of the target are 0xEE."""
    async with contextlib.AsyncExitStack() as stack:
        settings: dict[str, Any] = {"transports": (case.transport,), "num_blocks": NUM_BLOCKS}
        source = await stack.enter_async_context(
            ranks_of(
                *case.source,
                serve_for_leader,
                role=Role.PREFILL,
                whole=case.source_whole,
                **settings,
            )
        )
        target = await stack.enter_async_context(
            ranks_of(
                *case.target,
                read_for_leader,
                role=Role.DECODE,
                whole=case.target_whole,
                store_of=OnDevice if case.is_on_device else lambda memory: memory,
                corrupt_kv_blocks=case.num_corrupt,
                **settings,
            )
        )
        size = case.source_whole.block_size
        num_blocks = num_blocks_for(case.num_tokens, size)
        table = tuple(BlockId(block) for block in rng.sample(range(NUM_BLOCKS), num_blocks))
        planes = prompt_kv(WHOLE, num_blocks * size, np.random.default_rng(rng.randrange(2**32)))
        for rank, memory in enumerate(source.memories):
            for index, block in enumerate(table):
                memory.block(block)[:] = block_of(planes, source.layout.rank(rank), index).data
        for memory in target.memories:
            memory.bytes[:] = b"\xee" * memory.num_bytes
        regions = await stack.enter_async_context(
            serving(
                source.kv,
                worker_transports(source.settings, End(EPOCH)),
                set(table).issuperset,
                epoch=EPOCH,
            )
        )
        open_reader = await stack.enter_async_context(
            reading(
                target.kv,
                target.layout,
                worker_transports(target.settings, End(EPOCH)),
                epoch=EPOCH,
                read_s=60.0,
            )
        )
        reader = await open_reader(source.hello(regions))
        assert reader is not None
        stack.push_async_callback(reader.close)
        yield Workers(source=source, target=target, reader=reader, planes=planes, table=table)


@pytest.mark.parametrize("seed", range(40))
async def test_every_wanted_token_lands_and_no_other_block_is_touched(seed: int) -> None:
    rng = Random(seed)
    case = case_of(rng)
    size, their_size = case.target_whole.block_size, case.source_whole.block_size
    num_own = num_blocks_for(case.num_tokens, size) - case.first_block
    async with workers_of(case, rng) as both:
        own = tuple(BlockId(block) for block in rng.sample(range(NUM_BLOCKS), num_own))
        landing = Landing(blocks=own, first_block=case.first_block, block_size=size)
        receiver = HandoffReceiver(
            handoff_id(),
            reader=both.reader,
            landing=landing,
            num_tokens=case.num_tokens,
            vocab_size=1,
            on_first_token=lambda done: True,
        )
        assert receiver.first_block == landing.first_token // their_size
        next_block = receiver.first_block
        while not receiver.is_complete:
            count = rng.randint(1, len(both.table) - next_block)
            assert receiver.hear(await both.offer(next_block, count)), case
            await receiver.land()
            next_block += count
            landed = min(next_block * their_size, case.num_tokens)
            assert receiver.num_landed_tokens == landed
        receiver.end()
        assert receiver.num_corrupt_blocks >= case.num_corrupt
        for rank, memory in enumerate(both.target.memories):
            held = both.target.layout.rank(rank)
            for place, block in enumerate(own):
                index = case.first_block + place
                num_wanted = min(size, case.num_tokens - index * size)
                assert tokens_in(memory.block(block), held.layout, num_wanted) == tokens_of(
                    both.planes, held, index, num_wanted
                ), case
            for other in set(range(NUM_BLOCKS)) - set(own):
                assert set(memory.block(BlockId(other))) == {0xEE}, case


def tokens_in(block: memoryview, layout: KvLayout, count: int) -> list[bytes]:
    """The first `count` tokens of each K and V in a block."""
    found, start = [], 0
    for kv in layout.layers:
        for head_dim in (kv.k_head_dim, kv.v_head_dim):
            row = head_dim * layout.item_bytes
            plane = np.frombuffer(block, np.uint8, layout.block_size * kv.num_kv_heads * row, start)
            if layout.order is BlockOrder.HEADS:
                shaped = plane.reshape(kv.num_kv_heads, layout.block_size, row).transpose(1, 0, 2)
            else:
                shaped = plane.reshape(layout.block_size, kv.num_kv_heads, row)
            found.append(shaped[:count].tobytes())
            start += plane.size
    return found


def tokens_of(planes: Planes, held: Any, index: int, count: int) -> list[bytes]:
    start = index * held.layout.block_size
    return [
        plane[start : start + count, heads.start : heads.stop].tobytes()
        for layer, heads in zip(held.layers, held.heads, strict=True)
        for plane in planes[2 * layer : 2 * layer + 2]
    ]
