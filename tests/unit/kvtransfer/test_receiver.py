import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from kvtransfer.landing import Landing
from kvtransfer.receiver import HandoffReceiver
from kvtransfer.session import Phase, ProtocolViolation
from kvtransfer.transports.base import Transport
from kvtransfer.transports.faulty import FaultyTransport
from pdserve.domain.errors import (
    PdserveError,
    PeerFault,
    Reason,
    Refused,
    TransferFailed,
    WorkerLost,
)
from pdserve.domain.messages import (
    BlocksOffered,
    BlocksPulled,
    EndHandoff,
    HandoffFailed,
    HandoffRefused,
    PrefillDone,
    RemoteRegion,
)
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import (
    BLOCK_SIZE,
    DirectTransport,
    anyone,
    blocks,
    handoff_id,
    kv_memory,
    reader_of,
)

REMOTE = blocks(7, 3, 11, 0, 5)
LOCAL = blocks(2, 9, 4, 14, 6)
FIRST = 10
VOCAB_SIZE = 100


@dataclass
class Pair:
    """Source and target memory of five blocks that are asked for from block 10 of the prompt."""

    source: KvMemory
    target: KvMemory
    transport: DirectTransport
    region: RemoteRegion
    tokens: list[PrefillDone] = field(default_factory=list)
    needs_blocks: bool = True

    def receiver(
        self, *, corrupt: int | Literal["all"] = 0, thread_above_bytes: int = 1 << 20
    ) -> HandoffReceiver:
        self.target.thread_above_bytes = thread_above_bytes
        transport: Transport = self.transport
        if corrupt:
            transport = FaultyTransport(transport, corrupt)
        return HandoffReceiver(
            handoff_id(),
            reader=reader_of(transport, self.region, self.target),
            landing=Landing(blocks=LOCAL, first_block=FIRST, block_size=BLOCK_SIZE),
            num_tokens=(FIRST + len(LOCAL)) * BLOCK_SIZE,
            vocab_size=VOCAB_SIZE,
            on_first_token=self.take,
        )

    def take(self, message: PrefillDone) -> bool:
        self.tokens.append(message)
        return self.needs_blocks

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
        yield Pair(source, target, transport, transport.add(source, anyone))


def done(token_id: int = 1) -> PrefillDone:
    return PrefillDone(
        handoff=handoff_id(),
        first_token=SampledToken(token_id),
        queue_s=0.0,
        prefill_s=0.0,
        cached_tokens=0,
    )


def refused(reason: Reason = Reason.OVERLOADED) -> HandoffRefused:
    failure = Failed(reason=reason, message="full", retry_after_s=2.5)
    return HandoffRefused(handoff=handoff_id(), failure=failure)


def failed() -> HandoffFailed:
    failure = Failed(reason=Reason.TRANSFER_FAILED, message="gave up")
    return HandoffFailed(handoff=handoff_id(), failure=failure)


async def land(receiver: HandoffReceiver, offer: BlocksOffered) -> BlocksPulled | None:
    assert receiver.hear(offer)
    assert await receiver.wait_offer()
    return await receiver.land()


async def test_offers_land_in_order_at_the_reserved_blocks(pair: Pair) -> None:
    receiver = pair.receiver()
    assert receiver.hear(pair.offer(0, 2))
    assert receiver.hear(pair.offer(2, 5))
    pulled = await receiver.land()
    assert pulled == BlocksPulled(handoff=handoff_id(), first_block=FIRST, num_blocks=2)
    assert (receiver.num_landed_blocks, receiver.is_complete) == (2, False)
    await receiver.land()
    assert receiver.is_complete
    assert receiver.phase is Phase.LANDED
    assert pair.has_landed(0, 5)
    assert receiver.num_bytes == 5 * 64


async def test_blocks_that_were_not_reserved_are_left_alone(pair: Pair) -> None:
    before = bytes(pair.target.bytes)
    await land(pair.receiver(), pair.offer(0, 5))
    for block in range(16):
        if block not in LOCAL:
            assert pair.target.block(blocks(block)[0]) == before[block * 64 : block * 64 + 64]


@pytest.mark.parametrize("token_first", [True, False])
async def test_ready_when_token_and_blocks_are_there(pair: Pair, token_first: bool) -> None:
    receiver = pair.receiver()
    if token_first:
        assert receiver.hear(done())
    await land(receiver, pair.offer(0, 5))
    if not token_first:
        waiting = asyncio.create_task(receiver.wait_offer())
        await asyncio.sleep(0)
        assert not waiting.done()
        assert receiver.hear(done())
        assert not await waiting
    assert pair.tokens == [done()]
    assert not await receiver.wait_offer()
    phases = [receiver.phase]
    assert receiver.end() == EndHandoff(handoff=handoff_id())
    phases.append(receiver.phase)
    assert phases == [Phase.READY, Phase.COMPLETED]


@pytest.mark.parametrize("thread_above_bytes", [0, 1 << 20])
async def test_corrupt_blocks_are_read_once_more_and_counted(
    pair: Pair, thread_above_bytes: int
) -> None:
    receiver = pair.receiver(corrupt=2, thread_above_bytes=thread_above_bytes)
    await land(receiver, pair.offer(0, 5))
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
        await land(receiver, pair.offer(0, 3))
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
        await land(pair.receiver(), swapped)
    assert failure.value.reason is Reason.KV_INTEGRITY


async def test_a_block_that_changed_after_its_offer_is_not_accepted(pair: Pair) -> None:
    offer = pair.offer(0, 2)
    pair.source.block(REMOTE[1])[:] = bytes(64)
    with pytest.raises(TransferFailed) as failure:
        await land(pair.receiver(), offer)
    assert failure.value.reason is Reason.KV_INTEGRITY


BAD_OFFERS: dict[str, Callable[[BlocksOffered], BlocksOffered]] = {
    "empty": lambda offer: replace(offer, block_ids=(), digests=()),
    "before what was asked": lambda offer: replace(offer, first_block=FIRST - 1),
    "beyond what was asked": lambda offer: replace(offer, first_block=FIRST + 4),
    "out of turn": lambda offer: replace(offer, first_block=FIRST + 2),
    "overlapping what was offered": lambda offer: replace(offer, first_block=FIRST),
    "negative": lambda offer: replace(offer, first_block=-5),
    "a block beyond the region": lambda offer: replace(offer, block_ids=blocks(7, 16)),
    "a negative block": lambda offer: replace(offer, block_ids=blocks(7, -1)),
    "too few digests": lambda offer: replace(offer, digests=offer.digests[:1]),
    "too many digests": lambda offer: replace(offer, digests=offer.digests * 2),
    "a short digest": lambda offer: replace(offer, digests=(offer.digests[0], b"")),
}


@pytest.mark.parametrize("spoil", BAD_OFFERS.values(), ids=BAD_OFFERS.keys())
async def test_an_offer_that_was_not_asked_for_is_a_violation_and_is_not_read(
    pair: Pair, spoil: Callable[[BlocksOffered], BlocksOffered]
) -> None:
    receiver = pair.receiver()
    receiver.hear(pair.offer(0, 1))
    with pytest.raises(ProtocolViolation):
        receiver.hear(spoil(pair.offer(1, 3)))
    await receiver.land()
    assert receiver.hear(pair.offer(1, 3)), "it changed nothing"


async def test_an_offer_that_comes_again_is_dropped_and_not_read(pair: Pair) -> None:
    receiver = pair.receiver()
    assert receiver.hear(pair.offer(0, 2))
    assert not receiver.hear(pair.offer(0, 2))
    await receiver.land()
    assert not receiver.hear(pair.offer(1, 2))
    await land(receiver, pair.offer(2, 3))
    assert (pair.transport.num_reads, receiver.num_landed_blocks) == (2, 3)


async def test_a_first_token_that_comes_again_is_dropped_and_another_is_a_violation(
    pair: Pair,
) -> None:
    receiver = pair.receiver()
    assert receiver.hear(done(1))
    assert not receiver.hear(done(1))
    with pytest.raises(ProtocolViolation):
        receiver.hear(done(2))
    assert pair.tokens == [done(1)]


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**31])
async def test_a_first_token_beyond_the_vocabulary_is_a_violation(
    pair: Pair, token_id: int
) -> None:
    with pytest.raises(ProtocolViolation):
        pair.receiver().hear(done(token_id))
    assert pair.tokens == []


ENDS: dict[str, tuple[Callable[[HandoffReceiver], object], Phase]] = {
    "refused": (lambda receiver: receiver.hear(refused()), Phase.REFUSED),
    "failed": (lambda receiver: receiver.hear(failed()), Phase.FAILED),
    "lost": (lambda receiver: receiver.lose(WorkerLost("gone")), Phase.LOST),
    "ended": (lambda receiver: receiver.end(), Phase.ABANDONED),
}


@pytest.mark.parametrize(("end", "phase"), ENDS.values(), ids=ENDS.keys())
async def test_after_the_end_everything_is_late_and_no_end_is_sent(
    pair: Pair, end: Callable[[HandoffReceiver], object], phase: Phase
) -> None:
    receiver = pair.receiver()
    end(receiver)
    assert receiver.phase is phase
    for message in (pair.offer(0, 1), done(), refused(), failed(), replace(done(), queue_s=1.0)):
        assert not receiver.hear(message)
    receiver.lose(WorkerLost("again"))
    assert receiver.end() is None
    assert receiver.phase is phase
    assert (pair.tokens, pair.transport.num_reads) == ([], 0)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (lambda: refused(Reason.OVERLOADED), Refused("full", retry_after_s=2.5)),
        (lambda: refused(Reason.INTERNAL), PeerFault("full", reason=Reason.INTERNAL)),
        (lambda: failed(), PeerFault("gave up", reason=Reason.TRANSFER_FAILED)),
    ],
    ids=["refused", "refused as senseless", "failed"],
)
async def test_what_the_peer_says_is_raised_by_whoever_waits(
    pair: Pair, message: Callable[[], HandoffRefused | HandoffFailed], error: PdserveError
) -> None:
    receiver = pair.receiver()
    waiting = asyncio.create_task(receiver.wait_offer())
    await asyncio.sleep(0)
    receiver.hear(message())
    with pytest.raises(type(error)) as raised:
        await waiting
    assert (raised.value.message, raised.value.reason) == (error.message, error.reason)
    assert raised.value.retry_after_s == error.retry_after_s


async def test_a_refusal_after_an_offer_is_a_violation(pair: Pair) -> None:
    receiver = pair.receiver()
    receiver.hear(pair.offer(0, 1))
    with pytest.raises(ProtocolViolation):
        receiver.hear(refused())
    assert receiver.end() is not None, "it is still open there, as far as one can tell"


@pytest.mark.parametrize("end", ["failed", "lost", "violation"])
async def test_whatever_ends_it_when_ready_is_no_failure(pair: Pair, end: str) -> None:
    receiver = pair.receiver()
    await land(receiver, pair.offer(0, 5))
    receiver.hear(done())
    if end == "failed":
        assert receiver.hear(failed())
    elif end == "lost":
        receiver.lose(WorkerLost("gone"))
    else:
        receiver.fail(ProtocolViolation("another token"))
    assert not await receiver.wait_offer()
    assert (receiver.end() is not None) == (end == "violation")
    assert receiver.phase is Phase.COMPLETED


def break_off(receiver: HandoffReceiver) -> None:
    """All that can end it, in one turn."""
    receiver.fail(ProtocolViolation("another token"))
    receiver.hear(failed())
    receiver.lose(WorkerLost("gone"))


INTERRUPTIONS: dict[str, Callable[[HandoffReceiver], object]] = {
    "failed": lambda receiver: receiver.hear(failed()),
    "lost": lambda receiver: receiver.lose(WorkerLost("gone")),
    "violation": lambda receiver: receiver.fail(ProtocolViolation("another token")),
    "all at once": break_off,
}


@pytest.mark.parametrize("interrupt", INTERRUPTIONS.values(), ids=INTERRUPTIONS.keys())
@pytest.mark.parametrize("num_turns", [1, 2, 3])
async def test_a_read_ends_with_its_handoff_and_counts_for_nothing(
    pair: Pair, interrupt: Callable[[HandoffReceiver], object], num_turns: int
) -> None:
    pair.transport.is_slow = True
    receiver = pair.receiver(corrupt="all")
    receiver.hear(pair.offer(0, 3))
    landing = asyncio.create_task(receiver.land())
    for _ in range(num_turns):
        await asyncio.sleep(0)
    interrupt(receiver)
    with pytest.raises(PeerFault) as fault:
        await landing
    assert fault.value.reason is not Reason.KV_INTEGRITY
    assert (receiver.num_landed_blocks, receiver.num_corrupt_blocks) == (0, 0)
    receiver.end()
    before = bytes(pair.target.bytes)
    await asyncio.sleep(0)
    assert pair.target.bytes == before


async def test_a_token_that_is_the_whole_answer_ends_the_read_without_a_fault(pair: Pair) -> None:
    pair.transport.is_slow = True
    pair.needs_blocks = False
    receiver = pair.receiver()
    receiver.hear(pair.offer(0, 3))
    landing = asyncio.create_task(receiver.land())
    await asyncio.sleep(0)
    assert receiver.hear(done())
    assert await landing is None
    assert not receiver.hear(pair.offer(3, 5))
    assert not await receiver.wait_offer()
    assert receiver.end() is not None
    assert receiver.phase is Phase.ABANDONED


async def test_ending_while_blocks_are_written_is_a_bug(pair: Pair) -> None:
    pair.transport.is_slow = True
    receiver = pair.receiver()
    receiver.hear(pair.offer(0, 2))
    landing = asyncio.create_task(receiver.land())
    await asyncio.sleep(0)
    with pytest.raises(AssertionError):
        receiver.end()
    with pytest.raises(AssertionError):
        await receiver.land()
    landing.cancel()
    await asyncio.wait([landing])
    assert landing.cancelled()
    assert receiver.end() is not None
