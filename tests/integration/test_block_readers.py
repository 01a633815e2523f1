"""KV between workers of any ranks: real transports, real channels, each rank its own memory."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtransfer.following import read_for_leader, serve_for_leader
from kvtransfer.landing import Landing
from kvtransfer.leading import reading, serving
from kvtransfer.reading import BlockRead, BlockReader, DirectReader
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.transports import worker_transports
from kvtransfer.transports.base import End
from kvtransfer.transports.nixl_agent import is_installed
from pdserve.domain.errors import Reason, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import BlocksOffered, RemoteRegion, Role
from pdserve.engine.digest import DIGEST_BYTES, block_digest
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore
from tests.support.kv_handoff import blocks, handoff_id
from tests.support.ranked_kv import EPOCH, NUM_BLOCKS, WHOLE, OnDevice, Ranks, ranks_of

REMOTE = blocks(7, 3, 11, 0, 5, 6)
LOCAL = blocks(2, 9, 4, 14, 6, 7)
FIRST = 10
LANDING = Landing(blocks=LOCAL, first_block=FIRST, block_size=WHOLE.block_size)
NOTICE_S = 20.0
DIVISIONS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]


@dataclass(frozen=True, kw_only=True)
class Handed:
    """Two workers, and the reader of the one that has nothing yet."""

    source: Ranks
    target: Ranks
    content: NDArray[np.uint8]
    offered: set[BlockId]
    regions: Sequence[RemoteRegion]
    reader: BlockReader

    async def digests(self) -> list[bytes]:
        return await self.source.kv.digests(handoff_id(), self.indices, REMOTE)

    indices = range(FIRST, FIRST + len(REMOTE))

    async def wanted(self) -> BlockRead:
        return BlockRead(
            handoff=handoff_id(),
            block_size=WHOLE.block_size,
            indices=self.indices,
            remote_blocks=REMOTE,
            digests=await self.digests(),
            landing=LANDING,
        )

    async def offer(self) -> BlocksOffered:
        return BlocksOffered(
            handoff=handoff_id(),
            first_block=FIRST,
            block_ids=REMOTE,
            digests=tuple(await self.digests()),
        )

    def receiver(self) -> HandoffReceiver:
        return HandoffReceiver(
            handoff_id(),
            reader=self.reader,
            landing=LANDING,
            num_tokens=LANDING.end_token,
            vocab_size=1,
            on_first_token=lambda done: True,
        )

    def has_landed(self, place: int) -> bool:
        return self.target.holds(LOCAL[place], self.content[REMOTE[place]])


@contextlib.asynccontextmanager
async def handed(
    source: tuple[int, int],
    target: tuple[int, int],
    transport: str = "tcp",
    *,
    store_of: Callable[[KvMemory], KvStore] = lambda memory: memory,
    source_timers: Mapping[str, float] | None = None,
    **settings: Any,
) -> AsyncIterator[Handed]:
    """All of `REMOTE` is on offer; blocks of the target are 0xEE."""
    by = (transport,)
    async with contextlib.AsyncExitStack() as stack:
        giver = await stack.enter_async_context(
            ranks_of(
                *source,
                serve_for_leader,
                role=Role.PREFILL,
                transports=by,
                timers=source_timers or {},
            )
        )
        taker = await stack.enter_async_context(
            ranks_of(
                *target,
                read_for_leader,
                role=Role.DECODE,
                store_of=store_of,
                transports=by,
                **settings,
            )
        )
        content = np.random.default_rng(3).integers(
            0, 256, (NUM_BLOCKS, WHOLE.block_bytes), dtype=np.uint8
        )
        giver.fill(content)
        for memory in taker.memories:
            memory.bytes[:] = b"\xee" * memory.num_bytes
        offered = set(REMOTE)
        regions = await stack.enter_async_context(
            serving(
                giver.kv,
                worker_transports(giver.settings, End(EPOCH)),
                offered.issuperset,
                epoch=EPOCH,
            )
        )
        open_reader = await stack.enter_async_context(
            reading(
                taker.kv,
                taker.layout,
                worker_transports(taker.settings, End(EPOCH)),
                epoch=EPOCH,
                read_s=60.0,
            )
        )
        reader = await open_reader(giver.hello(regions))
        assert reader is not None
        stack.push_async_callback(reader.close)
        yield Handed(
            source=giver,
            target=taker,
            content=content,
            offered=offered,
            regions=regions,
            reader=reader,
        )


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(DIVISIONS, repeat=2)))
async def test_every_rank_gets_its_part_and_nothing_else_is_touched(
    source: tuple[int, int], target: tuple[int, int], transport: str
) -> None:
    async with handed(source, target, transport) as both:
        assert await both.reader.read(await both.wanted()) == set()
        assert all(both.has_landed(place) for place in range(len(REMOTE)))
        for memory in both.target.memories:
            for block in set(range(NUM_BLOCKS)) - set(LOCAL):
                assert set(memory.block(BlockId(block))) == {0xEE}


@pytest.mark.skipif(not is_installed(), reason="needs nixl: pip install 'pdserve[nixl]'")
@pytest.mark.parametrize(
    ("source", "target"), [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 1), (2, 1))]
)
async def test_nixl_reads_between_divisions(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    async with handed(source, target, "nixl") as both:
        assert both.reader.path.transport_name == "nixl"
        assert await both.reader.read(await both.wanted()) == set()
        assert all(both.has_landed(place) for place in range(len(REMOTE)))


async def test_a_digest_is_that_of_each_rank_in_their_order() -> None:
    async with handed((2, 2), (1, 1)) as both:
        memories, indices = both.source.memories, both.indices
        assert await both.digests() == [
            b"".join(block_digest(handoff_id(), index, each.block(block)) for each in memories)
            for index, block in zip(indices, REMOTE, strict=True)
        ]


async def test_a_block_is_sound_if_it_is_so_at_every_rank() -> None:
    async with handed((2, 2), (1, 1)) as both:
        for memory in both.source.memories:
            memory.bytes[:] = bytes(memory.num_bytes)
        both.source.memories[3].block(BlockId(1))[-4:] = b"\xff" * 4
        sound = await both.source.kv.are_sound(blocks(0, 1, 2))
        assert sound == [True, False, True]


async def test_equal_divisions_are_read_without_staging() -> None:
    async with handed((2, 2), (2, 2)) as both:
        own: Any = both.reader
        assert isinstance(own._ranks[0], DirectReader)
        assert both.reader.block_bytes == both.source.layout.block_bytes


@pytest.mark.parametrize("source", DIVISIONS)
async def test_blocks_on_a_device_get_their_parts_too(source: tuple[int, int]) -> None:
    async with handed(source, (2, 1), store_of=OnDevice) as both:
        assert await both.reader.read(await both.wanted()) == set()
        assert all(both.has_landed(place) for place in range(len(REMOTE)))


@pytest.mark.parametrize("target", DIVISIONS)
async def test_corrupt_blocks_are_found_at_each_rank_and_read_again(
    target: tuple[int, int],
) -> None:
    """Each rank damages one block that it reads."""
    async with handed((2, 1), target, corrupt_kv_blocks=1) as both:
        receiver = both.receiver()
        assert receiver.hear(await both.offer())
        await receiver.land()
        assert receiver.num_corrupt_blocks >= 1
        assert all(both.has_landed(place) for place in range(len(REMOTE)))
        receiver.end()


async def test_blocks_that_stay_corrupt_at_one_rank_fail_the_handoff() -> None:
    async with handed((2, 1), (1, 2), corrupt_kv_blocks="all") as both:
        receiver = both.receiver()
        assert receiver.hear(await both.offer())
        with pytest.raises(TransferFailed) as failure:
            await receiver.land()
        assert failure.value.reason is Reason.KV_INTEGRITY
        assert receiver.num_landed_blocks == 0
        receiver.end()


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("target", [(1, 1), (2, 2), (4, 1)])
async def test_the_digest_of_any_rank_counts(target: tuple[int, int], rank: int) -> None:
    async with handed((2, 2), target) as both:
        wanted = await both.wanted()
        digests = [bytearray(digest) for digest in wanted.digests]
        digests[4][rank * DIGEST_BYTES] ^= 1
        wrong = replace(wanted, digests=[bytes(digest) for digest in digests])
        assert await both.reader.read(wrong) == {4}


async def test_digests_of_another_number_of_ranks_are_a_violation() -> None:
    async with handed((2, 1), (1, 1)) as both:
        receiver, offer = both.receiver(), await both.offer()
        short = tuple(digest[:DIGEST_BYTES] for digest in offer.digests)
        with pytest.raises(TransferFailed, match="a digest of other than 32 bytes"):
            receiver.hear(replace(offer, digests=short))
        receiver.end()


@pytest.mark.parametrize("source", [(2, 1), (1, 2)])
async def test_other_ranks_ask_rank_0_what_is_on_offer(source: tuple[int, int]) -> None:
    async with handed(source, source) as both:
        [region] = [region for region in both.regions if region.rank == 1]
        [transport] = worker_transports(both.target.settings, End(EPOCH))
        memory = both.target.memories[1]
        await transport.read(region, REMOTE, memory, LOCAL)
        both.offered.remove(REMOTE[2])
        with pytest.raises(TransferFailed, match="not on offer"):
            await transport.read(region, REMOTE, memory, LOCAL)
        await transport.close()


async def test_a_rank_that_gets_no_answer_about_an_offer_refuses() -> None:
    async with handed((2, 1), (2, 1), source_timers={"transfer_idle_s": 0.1}) as both:
        wanted = await both.wanted()
        ours, _ = both.source.channels[0]

        async def silent(_: object) -> None:
            await asyncio.Event().wait()

        ours._handlers["kv.may_read"] = silent
        async with asyncio.timeout(NOTICE_S):
            with pytest.raises(TransferFailed, match="not on offer"):
                await both.reader.read(wanted)


@pytest.mark.parametrize("target", [(1, 1), (2, 1), (1, 2)])
async def test_after_a_cancelled_read_nothing_is_written_at_any_rank(
    target: tuple[int, int],
) -> None:
    """Rank 1 of the peer does not answer before the read is given up; then it does."""
    async with handed((2, 1), target) as both:
        ours, _ = both.source.channels[0]
        is_asked, may_answer = asyncio.Event(), asyncio.Event()
        answer = ours._handlers["kv.may_read"]

        async def late(message: Any) -> Any:
            is_asked.set()
            await may_answer.wait()
            return await answer(message)

        ours._handlers["kv.may_read"] = late
        reading_blocks = asyncio.create_task(both.reader.read(await both.wanted()))
        async with asyncio.timeout(NOTICE_S):
            await is_asked.wait()
            reading_blocks.cancel()
            await asyncio.wait([reading_blocks])
        assert reading_blocks.cancelled()
        for memory in both.target.memories:
            memory.bytes[:] = b"\xdd" * memory.num_bytes
        may_answer.set()
        for _, theirs in (*both.source.channels, *both.target.channels):
            async with asyncio.timeout(NOTICE_S):
                while theirs._answering:
                    await asyncio.wait(list(theirs._answering.values()))
        assert all(set(memory.bytes) == {0xDD} for memory in both.target.memories)
        # The reader is as good as before.
        assert await both.reader.read(await both.wanted()) == set()
        assert all(both.has_landed(place) for place in range(len(REMOTE)))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_peer_whose_second_rank_is_gone_fails_the_read_at_all_ranks(
    transport: str,
) -> None:
    async with handed((2, 1), (2, 1), transport) as both:
        wanted = await both.wanted()
        gone = [
            replace(region, address={**region.address, "port": "1", "pid": "1"})
            if region.rank == 1
            else region
            for region in both.regions
        ]
        async with reading(
            both.target.kv,
            both.target.layout,
            worker_transports(both.target.settings, End(EPOCH)),
            epoch=EPOCH,
            read_s=60.0,
        ) as open_reader:
            reader = await open_reader(both.source.hello(gone))
            if transport == "shm":  # it shows at once
                assert reader is None
                return
            assert reader is not None
            async with asyncio.timeout(NOTICE_S):
                with pytest.raises(TransferFailed):
                    await reader.read(wanted)
            await reader.close()


async def test_a_closed_reader_reads_no_more() -> None:
    async with handed((2, 1), (2, 1)) as both:
        wanted = await both.wanted()
        await both.reader.close()
        with pytest.raises(TransferFailed):
            await both.reader.read(wanted)


async def test_a_peer_that_says_nothing_of_one_rank_is_not_reached() -> None:
    async with handed((2, 1), (2, 1)) as both:
        first = [region for region in both.regions if region.rank == 0]
        async with reading(
            both.target.kv,
            both.target.layout,
            worker_transports(both.target.settings, End(EPOCH)),
            epoch=EPOCH,
            read_s=60.0,
        ) as open_reader:
            assert await open_reader(both.source.hello(first)) is None
