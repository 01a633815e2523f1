import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from kvtransfer.digest import block_digest
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.session import Phase, ProtocolViolation
from kvtransfer.transports.base import Transport
from kvtransfer.transports.faulty import FaultyTransport
from pdserve.domain.errors import Reason, TransferFailed
from pdserve.domain.messages import (
    BlocksOffered,
    BlocksPulled,
    EndHandoff,
    PrefillDone,
    RemoteRegion,
)
from pdserve.domain.tokens import SampledToken
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import DirectTransport, blocks, handoff_id, kv_memory

REMOTE = blocks(7, 3, 11, 0, 5)
LOCAL = blocks(2, 9, 4, 14, 6)
FIRST = 10


@dataclass
class Pair:
    """Source and target memory of five blocks that are asked for from block 10 of the prompt."""

    source: KvMemory
    target: KvMemory
    transport: DirectTransport
    region: RemoteRegion

    def receiver(
        self, *, corrupt: int | Literal["all"] = 0, thread_above_bytes: int = 1 << 20
    ) -> HandoffReceiver:
        transport: Transport = self.transport
        if corrupt:
            transport = FaultyTransport(transport, corrupt)
        return HandoffReceiver(
            handoff_id(),
            transport=transport,
            region=self.region,
            memory=self.target,
            local_blocks=LOCAL,
            first_block=FIRST,
            thread_above_bytes=thread_above_bytes,
        )

    def offer(self, start: int, end: int) -> BlocksOffered:
        return BlocksOffered(
            handoff=handoff_id(),
            first_block=FIRST + start,
            block_ids=REMOTE[start:end],
            digests=tuple(
                block_digest(handoff_id(), FIRST + place, self.source.block(REMOTE[place]))
                for place in range(start, end)
            ),
        )

    def has_landed(self, start: int, end: int) -> bool:
        return all(
            self.target.block(LOCAL[place]) == self.source.block(REMOTE[place])
            for place in range(start, end)
        )


@pytest.fixture
def pair() -> Iterator[Pair]:
    with kv_memory(16, seed=3) as source, kv_memory(16) as target:
        transport = DirectTransport()
        yield Pair(source, target, transport, transport.add(source, lambda ids: True))


def done(token_id: int = 1) -> PrefillDone:
    return PrefillDone(
        handoff=handoff_id(),
        first_token=SampledToken(token_id),
        queue_s=0.0,
        prefill_s=0.0,
        cached_tokens=0,
    )


async def test_offers_land_in_order_at_the_reserved_blocks(pair: Pair) -> None:
    receiver = pair.receiver()
    pulled = await receiver.land(pair.offer(0, 2))
    assert pulled == BlocksPulled(handoff=handoff_id(), first_block=FIRST, num_blocks=2)
    assert (receiver.num_landed_blocks, receiver.is_complete) == (2, False)
    await receiver.land(pair.offer(2, 5))
    assert receiver.is_complete
    assert receiver.phase is Phase.LANDED
    assert pair.has_landed(0, 5)
    assert receiver.num_bytes == 5 * 64


async def test_blocks_that_were_not_reserved_are_left_alone(pair: Pair) -> None:
    before = bytes(pair.target.bytes)
    await pair.receiver().land(pair.offer(0, 5))
    for block in range(16):
        if block not in LOCAL:
            assert pair.target.block(blocks(block)[0]) == before[block * 64 : block * 64 + 64]


@pytest.mark.parametrize("token_first", [True, False])
async def test_ready_when_token_and_blocks_are_there(pair: Pair, token_first: bool) -> None:
    receiver = pair.receiver()
    if token_first:
        assert receiver.done(done())
    await receiver.land(pair.offer(0, 5))
    if not token_first:
        assert not receiver.is_ready
        assert receiver.done(done())
    assert receiver.is_ready
    assert receiver.end() == EndHandoff(handoff=handoff_id())
    assert receiver.phase is Phase.COMPLETED


@pytest.mark.parametrize("thread_above_bytes", [0, 1 << 20])
async def test_corrupt_blocks_are_read_once_more_and_counted(
    pair: Pair, thread_above_bytes: int
) -> None:
    receiver = pair.receiver(corrupt=2, thread_above_bytes=thread_above_bytes)
    await receiver.land(pair.offer(0, 5))
    assert pair.has_landed(0, 5)
    assert receiver.num_corrupt_blocks == 2
    assert receiver.num_bytes == 7 * 64
    assert pair.transport.num_reads == 2


@pytest.mark.parametrize("thread_above_bytes", [0, 1 << 20])
async def test_blocks_that_stay_corrupt_fail_the_handoff_and_do_not_count_as_landed(
    pair: Pair, thread_above_bytes: int
) -> None:
    receiver = pair.receiver(corrupt="all", thread_above_bytes=thread_above_bytes)
    with pytest.raises(TransferFailed) as failure:
        await receiver.land(pair.offer(0, 3))
    assert failure.value.reason is Reason.KV_INTEGRITY
    assert receiver.num_landed_blocks == 0
    assert receiver.num_corrupt_blocks == 6
    assert pair.transport.num_reads == 2
    assert receiver.end() is not None
    assert receiver.phase is Phase.ABANDONED


async def test_a_block_that_belongs_to_another_position_is_not_accepted(pair: Pair) -> None:
    offer = pair.offer(0, 2)
    swapped = replace(offer, block_ids=offer.block_ids[::-1])
    with pytest.raises(TransferFailed) as failure:
        await pair.receiver().land(swapped)
    assert failure.value.reason is Reason.KV_INTEGRITY


async def test_a_block_that_changed_after_its_offer_is_not_accepted(pair: Pair) -> None:
    offer = pair.offer(0, 2)
    pair.source.block(REMOTE[1])[:] = bytes(64)
    with pytest.raises(TransferFailed) as failure:
        await pair.receiver().land(offer)
    assert failure.value.reason is Reason.KV_INTEGRITY


BAD_OFFERS: dict[str, Callable[[BlocksOffered], BlocksOffered]] = {
    "empty": lambda offer: replace(offer, block_ids=(), digests=()),
    "before what was asked": lambda offer: replace(offer, first_block=FIRST - 1),
    "beyond what was asked": lambda offer: replace(offer, first_block=FIRST + 4),
    "out of turn": lambda offer: replace(offer, first_block=FIRST + 2),
    "overlapping what has landed": lambda offer: replace(offer, first_block=FIRST),
    "negative": lambda offer: replace(offer, first_block=-5),
    "a block beyond the region": lambda offer: replace(offer, block_ids=blocks(7, 16)),
    "a negative block": lambda offer: replace(offer, block_ids=blocks(7, -1)),
    "too few digests": lambda offer: replace(offer, digests=offer.digests[:1]),
    "too many digests": lambda offer: replace(offer, digests=offer.digests * 2),
    "a short digest": lambda offer: replace(offer, digests=(offer.digests[0], b"")),
    "of another attempt": lambda offer: replace(offer, handoff=handoff_id(attempt=2)),
}


@pytest.mark.parametrize("spoil", BAD_OFFERS.values(), ids=BAD_OFFERS.keys())
async def test_an_offer_that_was_not_asked_for_is_a_violation_and_is_not_read(
    pair: Pair, spoil: Callable[[BlocksOffered], BlocksOffered]
) -> None:
    receiver = pair.receiver()
    await receiver.land(pair.offer(0, 1))
    with pytest.raises(ProtocolViolation):
        await receiver.land(spoil(pair.offer(1, 3)))
    assert pair.transport.num_reads == 1
    assert receiver.num_landed_blocks == 1


async def test_an_offer_that_comes_again_is_answered_again_and_not_read(pair: Pair) -> None:
    receiver = pair.receiver()
    offer = pair.offer(0, 2)
    pulled = await receiver.land(offer)
    await receiver.land(pair.offer(2, 3))
    assert await receiver.land(offer) == pulled
    assert (pair.transport.num_reads, receiver.num_late) == (2, 1)
    assert receiver.num_landed_blocks == 3


async def test_a_first_token_that_comes_again_is_dropped_and_another_is_a_violation(
    pair: Pair,
) -> None:
    receiver = pair.receiver()
    assert receiver.done(done(1))
    assert not receiver.done(done(1))
    with pytest.raises(ProtocolViolation):
        receiver.done(done(2))
    assert receiver.num_late == 1


@pytest.mark.parametrize("end", ["refused", "failed", "lost", "end"])
async def test_after_the_end_everything_is_late(pair: Pair, end: str) -> None:
    receiver = pair.receiver()
    getattr(receiver, end)()
    assert receiver.is_over
    with pytest.raises(TransferFailed) as failure:
        await receiver.land(pair.offer(0, 1))
    assert failure.value.reason is Reason.FENCED
    assert not receiver.done(done())
    assert not receiver.refused()
    assert not receiver.failed()
    receiver.lost()
    assert receiver.end() is None
    assert (receiver.num_late, pair.transport.num_reads) == (4, 0)


async def test_a_refusal_after_an_offer_is_a_violation(pair: Pair) -> None:
    receiver = pair.receiver()
    await receiver.land(pair.offer(0, 1))
    with pytest.raises(ProtocolViolation):
        receiver.refused()


async def test_losing_the_stream_when_ready_is_a_completion(pair: Pair) -> None:
    receiver = pair.receiver()
    await receiver.land(pair.offer(0, 5))
    receiver.done(done())
    receiver.lost()
    assert receiver.phase is Phase.COMPLETED
    assert receiver.is_ready


def step(landing: Coroutine[Any, Any, BlocksPulled]) -> None:
    landing.send(None)


def test_blocks_read_while_the_handoff_ends_do_not_count(pair: Pair) -> None:
    pair.transport.is_slow = True
    receiver = pair.receiver()
    landing = receiver.land(pair.offer(0, 1))
    step(landing)
    receiver.failed()
    with pytest.raises(TransferFailed) as failure:
        step(landing)
    assert failure.value.reason is Reason.FENCED
    assert receiver.num_landed_blocks == 0


def test_ending_while_blocks_are_written_is_a_bug(pair: Pair) -> None:
    pair.transport.is_slow = True
    receiver = pair.receiver()
    landing = receiver.land(pair.offer(0, 2))
    step(landing)
    with pytest.raises(AssertionError):
        receiver.end()
    with pytest.raises(asyncio.CancelledError):
        landing.throw(asyncio.CancelledError())
    assert receiver.end() is not None


def test_two_landings_at_once_are_a_bug(pair: Pair) -> None:
    pair.transport.is_slow = True
    receiver = pair.receiver()
    landing = receiver.land(pair.offer(0, 1))
    step(landing)
    with pytest.raises(AssertionError):
        step(receiver.land(pair.offer(0, 1)))
    landing.close()
