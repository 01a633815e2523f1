import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.sender import HandoffSender, SenderTable, check_start
from kvtransfer.session import Event, Phase, ProtocolViolation
from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.messages import BlocksPulled
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import BLOCK_SIZE, blocks, handoff_id, kv_memory, start_of

LEASE_S = 10.0


@pytest.fixture
def memory() -> Iterator[KvMemory]:
    with kv_memory(num_blocks=16, seed=1) as memory:
        yield memory


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    """Whatever a test does, it must leave no block behind."""
    pool = BlockPool(16)
    yield pool
    assert pool.usage().is_idle


def sender_of(
    pool: BlockPool,
    memory: KvMemory,
    *,
    num_tokens: int = 14,
    first_block: int = 0,
    handoff: HandoffId | None = None,
    now_s: float = 0.0,
    deadline_s: float = 60.0,
) -> HandoffSender:
    """14 tokens: three full blocks and a partial one."""
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    table = pool.reserve(num_blocks)
    assert table is not None
    table.hold(0, num_blocks)
    start = replace(start_of(num_tokens, first_block, handoff), deadline_s=deadline_s)
    return HandoffSender(
        start,
        block_table=table,
        memory=memory,
        block_size=memory.layout.block_size,
        lease_s=LEASE_S,
        now_s=now_s,
    )


def may_read(sender: HandoffSender, block_ids: Sequence[BlockId]) -> bool:
    return not sender.not_offered(set(block_ids))


def pulled(first: int, count: int, handoff: HandoffId | None = None) -> BlocksPulled:
    return BlocksPulled(handoff=handoff or handoff_id(), first_block=first, num_blocks=count)


async def test_only_complete_blocks_are_offered_until_the_prompt_is_computed(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory)
    assert await sender.offer(3, is_last=False) is None
    first = await sender.offer(9, is_last=False)
    assert first is not None
    assert (first.first_block, len(first.block_ids)) == (0, 2)
    assert await sender.offer(11, is_last=False) is None
    last = await sender.offer(14, is_last=True)
    assert last is not None
    assert (last.first_block, len(last.block_ids)) == (2, 2)
    sender.end(Event.FAIL)


async def test_what_is_much_is_offered_bit_by_bit(
    pool: BlockPool, memory: KvMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.sender.MAX_OFFERED_BLOCKS", 3)
    sender = sender_of(pool, memory)
    first = await sender.offer(14, is_last=True)
    rest = await sender.offer(14, is_last=True)
    assert first is not None
    assert rest is not None
    assert (len(first.block_ids), rest.first_block, len(rest.block_ids)) == (3, 3, 1)
    assert await sender.offer(14, is_last=True) is None
    sender.end(Event.END)


async def test_blocks_that_the_peer_has_are_never_offered(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory, first_block=2)
    assert await sender.offer(8, is_last=False) is None
    offer = await sender.offer(14, is_last=True)
    assert offer is not None
    assert (offer.first_block, len(offer.block_ids)) == (2, 2)
    sender.end(Event.FAIL)


async def test_an_offer_names_the_blocks_and_their_digests(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory, first_block=1)
    offer = await sender.offer(14, is_last=True)
    assert offer is not None
    for place, (block_id, digest) in enumerate(zip(offer.block_ids, offer.digests, strict=True)):
        assert digest == block_digest(handoff_id(), 1 + place, memory.block(block_id))
    sender.end(Event.FAIL)


async def test_blocks_are_pinned_and_readable_from_offer_to_pull(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory)
    offer = await sender.offer(14, is_last=True)
    assert offer is not None
    assert pool.usage().pinned == 4
    assert may_read(sender, offer.block_ids)
    assert sender.pulled(pulled(0, 3))
    assert pool.usage().pinned == 1
    assert not may_read(sender, offer.block_ids[:1])
    assert may_read(sender, offer.block_ids[3:])
    sender.pulled(pulled(3, 1))
    assert pool.usage().pinned == 0
    assert pool.usage().held == 4
    sender.end(Event.END)


async def test_a_block_that_was_not_offered_may_not_be_read(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory)
    offer = await sender.offer(8, is_last=False)
    assert offer is not None
    foreign = BlockId(15)
    assert foreign not in offer.block_ids
    assert not may_read(sender, (*offer.block_ids, foreign))
    sender.end(Event.FAIL)


@pytest.mark.parametrize("cause", [Event.END, Event.FAIL, Event.EXPIRE, Event.LOSE])
def test_every_ending_gives_back_the_blocks_of_a_handoff_that_was_asked(
    pool: BlockPool, memory: KvMemory, cause: Event
) -> None:
    sender = sender_of(pool, memory)
    sender.end(cause)
    assert sender.is_over
    assert pool.usage().is_idle


@pytest.mark.parametrize("cause", [Event.END, Event.FAIL, Event.EXPIRE, Event.LOSE])
async def test_every_ending_gives_back_pinned_blocks_once(
    pool: BlockPool, memory: KvMemory, cause: Event
) -> None:
    sender = sender_of(pool, memory)
    offer = await sender.offer(14, is_last=True)
    assert offer is not None
    sender.pulled(pulled(0, 1))
    sender.end(cause)
    assert pool.usage().is_idle
    other = pool.reserve(16)  # would be hurt by a second release
    sender.end(cause)
    assert pool.usage().free == 0
    assert not may_read(sender, offer.block_ids)
    assert other is not None
    other.release()


async def test_work_that_finishes_after_the_end_offers_nothing(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory)
    sender.end(Event.END)
    assert await sender.offer(14, is_last=True) is None
    assert not sender.sampled()


async def test_a_handoff_that_gave_all_it_was_asked_for_completes(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory)
    await sender.offer(14, is_last=True)
    assert sender.sampled()
    sender.pulled(pulled(0, 4))
    phases = [sender.phase]
    sender.end(Event.LOSE)
    phases.append(sender.phase)
    assert phases == [Phase.READY, Phase.COMPLETED]


async def test_pulls_that_come_again_or_late_are_told_apart_and_change_nothing(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory)
    await sender.offer(14, is_last=True)
    assert sender.pulled(pulled(0, 2))
    assert not sender.pulled(pulled(0, 2))
    assert not sender.pulled(pulled(1, 1))
    assert pool.usage().pinned == 2
    sender.end(Event.END)
    assert not sender.pulled(pulled(2, 2))


@pytest.mark.parametrize(
    ("first", "count"), [(0, 3), (1, 1), (2, 1), (0, 0), (0, -1), (-1, 1), (5, 9), (1, 2)]
)
async def test_a_pull_of_what_was_not_offered_in_turn_is_a_violation(
    pool: BlockPool, memory: KvMemory, first: int, count: int
) -> None:
    sender = sender_of(pool, memory)
    await sender.offer(8, is_last=False)
    with pytest.raises(ProtocolViolation):
        sender.pulled(pulled(first, count))
    assert pool.usage().pinned == 2
    sender.end(Event.FAIL)


NUMBERS = st.integers(-3, 8) | st.sampled_from([2**31, 2**32 - 1, -(2**63), 2**64])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12), st.integers(0, 4))
def test_no_sequence_of_pulls_makes_a_sender_fail_or_leak(
    pulls: list[tuple[int, int]], num_offered: int
) -> None:
    pool = BlockPool(16)
    with kv_memory(num_blocks=16) as memory:
        sender = sender_of(pool, memory)
        offering = sender.offer(min(14, num_offered * BLOCK_SIZE), is_last=num_offered == 4)
        with pytest.raises(StopIteration):  # so little is digested at once
            offering.send(None)
        for first, count in pulls:
            pinned = pool.usage().pinned
            is_pulled = False
            with contextlib.suppress(ProtocolViolation):
                is_pulled = sender.pulled(pulled(first, count))
            assert pool.usage().pinned == pinned - (count if is_pulled else 0)
        sender.end(Event.LOSE)
    assert pool.usage().is_idle


@pytest.mark.parametrize(("num_tokens", "first_block"), [(0, 0), (8, 2), (8, 99), (8, -1)])
def test_a_start_that_asks_for_no_block_is_a_violation(num_tokens: int, first_block: int) -> None:
    with pytest.raises(ProtocolViolation):
        check_start(start_of(num_tokens, first_block), BLOCK_SIZE)


def test_a_lease_is_out_unless_renewed(pool: BlockPool, memory: KvMemory) -> None:
    sender = sender_of(pool, memory, now_s=5.0)
    assert sender.expires_at_s == 15.0
    assert not sender.is_expired(14.9)
    assert sender.is_expired(15.0)
    sender.renew(14.0)
    assert not sender.is_expired(23.9)
    assert sender.is_expired(24.0)
    sender.end(Event.EXPIRE)
    assert not sender.is_expired(99.0)


def test_no_renewal_keeps_blocks_beyond_the_deadline_of_the_request(
    pool: BlockPool, memory: KvMemory
) -> None:
    sender = sender_of(pool, memory, now_s=5.0, deadline_s=12.0)
    for now_s in (5.0, 10.0, 16.0):
        sender.renew(now_s)
    assert not sender.is_expired(16.9)
    assert sender.is_expired(17.0)
    sender.end(Event.EXPIRE)


async def test_table_reads_are_allowed_for_what_any_handoff_offers(
    pool: BlockPool, memory: KvMemory
) -> None:
    table: SenderTable[str] = SenderTable()
    senders = [sender_of(pool, memory, handoff=handoff_id(name), num_tokens=8) for name in "ab"]
    for sender in senders:
        table.add("d1", sender)
    offers = [await sender.offer(8, is_last=True) for sender in senders]
    both = tuple(block for offer in offers if offer for block in offer.block_ids)
    assert len(both) == 4
    assert table.may_read(both)
    assert not table.may_read((*both, *blocks(15)))
    table.end("d1", senders[0].handoff, Event.END)
    assert not table.may_read(both)
    assert table.may_read(both[2:])
    table.end("d1", senders[1].handoff, Event.END)
    assert not table.may_read(both[2:])
    assert table.may_read(())


def test_table_remembers_past_handoffs_so_that_a_second_start_is_a_duplicate(
    pool: BlockPool, memory: KvMemory
) -> None:
    table: SenderTable[str] = SenderTable(max_num_past=1)
    first, second = (handoff_id(retry=retry) for retry in (0, 1))
    for handoff in (first, second):
        table.add("d1", sender_of(pool, memory, handoff=handoff))
        assert table.is_known("d1", handoff)
        table.end("d1", handoff, Event.END)
    assert table.is_known("d1", second)
    assert not table.is_known("d1", first), "the memory of the past is bounded"
    assert len(table) == 0


def test_table_remembers_starts_that_nothing_came_of() -> None:
    table: SenderTable[str] = SenderTable()
    table.remember("d1", handoff_id())
    assert table.is_known("d1", handoff_id())
    assert len(table) == 0


def test_table_has_no_handoff_that_is_over(pool: BlockPool, memory: KvMemory) -> None:
    table: SenderTable[str] = SenderTable()
    sender = sender_of(pool, memory)
    table.add("d1", sender)
    assert table.get("d1", sender.handoff) is sender
    assert table.end("d1", sender.handoff, Event.END)
    assert not table.end("d1", sender.handoff, Event.END)
    assert table.get("d1", sender.handoff) is None


def test_a_peer_cannot_reach_the_handoffs_of_another(pool: BlockPool, memory: KvMemory) -> None:
    table: SenderTable[str] = SenderTable()
    sender = sender_of(pool, memory)
    table.add("d1", sender)
    assert table.get("rogue", sender.handoff) is None
    table.end("rogue", sender.handoff, Event.END)
    assert not table.is_known("rogue", sender.handoff)
    assert not sender.is_over
    table.end("d1", sender.handoff, Event.END)


def test_a_lost_stream_ends_its_own_handoffs_only(pool: BlockPool, memory: KvMemory) -> None:
    table: SenderTable[str] = SenderTable()
    lost = [sender_of(pool, memory, handoff=handoff_id(name)) for name in "ab"]
    kept = sender_of(pool, memory, handoff=handoff_id("c"))
    for sender in lost:
        table.add("d1", sender)
    table.add("d2", kept)
    table.end_peer("d1")
    assert [sender.phase for sender in lost] == [Phase.LOST, Phase.LOST]
    assert not kept.is_over
    table.end("d2", kept.handoff, Event.END)


def test_table_expires_what_is_due_and_says_when_the_next_is(
    pool: BlockPool, memory: KvMemory
) -> None:
    table: SenderTable[str] = SenderTable()
    assert table.next_expiry_s() is None
    early = sender_of(pool, memory, handoff=handoff_id("a"), now_s=0.0)
    late = sender_of(pool, memory, handoff=handoff_id("b"), now_s=3.0)
    table.add("d1", early)
    table.add("d1", late)
    assert table.next_expiry_s() == 10.0
    assert table.expire(9.9) == []
    assert table.expire(10.0) == [("d1", early.handoff)]
    assert early.phase is Phase.EXPIRED
    assert table.next_expiry_s() == 13.0
    assert table.expire(13.0) == [("d1", late.handoff)]
