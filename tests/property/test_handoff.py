"""Two ends of many handoffs over a link that delays, repeats, reorders between handoffs, and drops.

The prefill side is a `SenderTable` over a real block pool and memory, the decode side a
`HandoffReceiver` for each request over another. Messages of one handoff stay in order, as on a
stream, but any of them may be delivered again; those of different handoffs overtake each other.
Block content is what `content` says for (handoff, block), so a foreign or stale block shows.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.receiver import HandoffReceiver
from kvtransfer.sender import HandoffSender, SenderTable, check_start
from kvtransfer.session import Event, Phase
from kvtransfer.transports.faulty import FaultyTransport
from pdserve.domain.errors import Reason, TransferFailed
from pdserve.domain.ids import HandoffId
from pdserve.domain.messages import (
    BlocksOffered,
    BlocksPulled,
    DecodeToPrefill,
    EndHandoff,
    HandoffFailed,
    HandoffHello,
    HandoffRefused,
    PrefillDone,
    PrefillToDecode,
    RenewLeases,
    StartHandoff,
)
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.block_pool import BlockPool, BlockTable
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import (
    BLOCK_SIZE,
    DirectTransport,
    handoff_id,
    layout_of,
    start_of,
)

NUM_BLOCKS = 8
BLOCK_BYTES = 16
LEASE_S = 10.0
MAX_PROMPT_BLOCKS = 5


def content(handoff: HandoffId, block_index: int) -> bytes:
    return Random(f"{handoff}/{block_index}").randbytes(BLOCK_BYTES)


@dataclass
class Channel:
    """One handoff's messages, each way in order."""

    to_prefill: deque[DecodeToPrefill] = field(default_factory=deque)
    to_decode: deque[PrefillToDecode] = field(default_factory=deque)
    past_to_prefill: list[DecodeToPrefill] = field(default_factory=list)
    past_to_decode: list[PrefillToDecode] = field(default_factory=list)


@dataclass
class Decode:
    """One handoff at the decode worker."""

    start: StartHandoff
    receiver: HandoffReceiver
    table: BlockTable
    offers: deque[BlocksOffered] = field(default_factory=deque)
    landing: Coroutine[Any, Any, BlocksPulled] | None = None


@dataclass
class Prefill:
    """One handoff at the prefill worker."""

    start: StartHandoff
    sender: HandoffSender
    table: BlockTable
    num_computed: int = 0


class Handoffs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        layout = layout_of(BLOCK_BYTES)
        self.now_s = 0.0
        self.link = 0  # counts streams: each is another peer to the prefill worker
        self.num_started = 0
        self.source, self.target = KvMemory(layout, NUM_BLOCKS), KvMemory(layout, NUM_BLOCKS)
        self.prefill_pool, self.decode_pool = BlockPool(NUM_BLOCKS), BlockPool(NUM_BLOCKS)
        self.senders: SenderTable[int] = SenderTable()
        self.all_senders: list[HandoffSender] = []
        self.all_receivers: list[HandoffReceiver] = []
        self.prefills: dict[HandoffId, Prefill] = {}
        self.decodes: dict[HandoffId, Decode] = {}
        self.channels: dict[HandoffId, Channel] = {}
        inner = DirectTransport(is_slow=True)
        # A reader of shared memory is not asked whether it may read: only digests protect it.
        self.region = inner.add(self.source, lambda block_ids: True)
        self.transport = FaultyTransport(inner, 0)

    # The decode worker --------------------------------------------------------------------------

    @rule(num_tokens=st.integers(1, MAX_PROMPT_BLOCKS * BLOCK_SIZE), skip=st.integers(0, 4))
    def start(self, num_tokens: int, skip: int) -> None:
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        first_block = min(skip, num_blocks - 1)
        table = self.decode_pool.reserve(num_blocks - first_block)
        if table is None:
            return
        self.num_started += 1
        handoff = handoff_id(f"r{self.num_started // 2}", retry=self.num_started % 2)
        start = start_of(num_tokens, first_block, handoff)
        receiver = HandoffReceiver(
            handoff,
            transport=self.transport,
            region=self.region,
            memory=self.target,
            local_blocks=table.block_ids,
            first_block=first_block,
        )
        self.all_receivers.append(receiver)
        self.decodes[handoff] = Decode(start, receiver, table)
        self.channels[handoff] = Channel()
        self.channels[handoff].to_prefill.append(start)

    @precondition(lambda self: self.decodes)
    @rule(data=st.data(), num_steps=st.integers(1, 12))
    def land(self, data: st.DataObject, num_steps: int) -> None:
        """Some steps of one handoff's landings: in each a block is copied, or all are checked."""
        decode = self.pick_decode(data)
        for _ in range(num_steps):
            if decode.receiver.handoff in self.decodes:
                self.step(decode)

    def pick_decode(self, data: st.DataObject) -> Decode:
        return data.draw(st.sampled_from(list(self.decodes.values())), label="decode")

    def step(self, decode: Decode) -> None:
        if decode.landing is None:
            if not decode.offers:
                return
            decode.landing = decode.receiver.land(decode.offers.popleft())
        try:
            decode.landing.send(None)
        except StopIteration as stop:
            decode.landing = None
            self.send_to_prefill(stop.value)
            self.check_landed(decode)
            self.finish_if_ready(decode)
        except TransferFailed as failure:
            if failure.reason not in (Reason.KV_INTEGRITY, Reason.FENCED):
                raise  # a violation, where both ends are correct
            decode.landing = None
            self.give_up_on(decode)

    def check_landed(self, decode: Decode) -> None:
        """What was accepted is what the prompt's prefill computed, to the byte."""
        for place in range(decode.receiver.num_landed_blocks):
            expected = content(decode.receiver.handoff, decode.start.first_block + place)
            assert self.target.block(decode.table.block_ids[place]) == expected

    def finish_if_ready(self, decode: Decode) -> None:
        if decode.receiver.phase is Phase.READY:
            self.check_landed(decode)
            assert decode.receiver.num_landed_blocks == len(decode.table.block_ids)
            self.give_up_on(decode)
            assert decode.receiver.is_ready, "every way out of READY is completion"

    @precondition(lambda self: self.decodes)
    @rule(data=st.data(), is_cancelled=st.sampled_from([False, False, True]))
    def cancel(self, data: st.DataObject, is_cancelled: bool) -> None:
        if is_cancelled:
            self.give_up_on(self.pick_decode(data))

    def give_up_on(self, decode: Decode) -> None:
        """Whatever the phase: stop writing, tell the peer, free the blocks."""
        if decode.landing is not None:
            try:
                decode.landing.throw(asyncio.CancelledError())
            except asyncio.CancelledError:
                decode.landing = None
            assert decode.landing is None
        end = decode.receiver.end()
        if end is not None:
            self.send_to_prefill(end)
        decode.table.release()
        self.decodes.pop(decode.receiver.handoff)

    @precondition(lambda self: self.decodes)
    @rule()
    def renew(self) -> None:
        for handoff in self.decodes:
            self.send_to_prefill(RenewLeases((handoff,)))

    @rule(num_blocks=st.integers(1, 3))
    def corrupt(self, num_blocks: int) -> None:
        """The next blocks read are damaged on the way."""
        self.transport.corrupt = self.transport.num_corrupted + num_blocks

    def hear_at_decode(self, message: PrefillToDecode) -> None:
        assert not isinstance(message, HandoffHello)
        decode = self.decodes.get(message.handoff)
        if decode is None:
            return  # late: the handoff is over here
        if isinstance(message, BlocksOffered):
            decode.offers.append(message)
        elif isinstance(message, PrefillDone):
            decode.receiver.done(message)
            self.finish_if_ready(decode)
        elif isinstance(message, HandoffRefused):
            decode.receiver.refused()
            self.give_up_on(decode)
        elif isinstance(message, HandoffFailed):
            decode.receiver.failed()
            self.give_up_on(decode)

    # The prefill worker -------------------------------------------------------------------------

    def hear_at_prefill(self, message: DecodeToPrefill) -> None:
        if isinstance(message, StartHandoff):
            self.accept(message)
        elif isinstance(message, BlocksPulled):
            sender = self.senders.get(self.link, message.handoff)
            if sender is not None:
                sender.pulled(message)
        elif isinstance(message, EndHandoff):
            self.senders.end(self.link, message.handoff, Event.END)
        elif isinstance(message, RenewLeases):
            for handoff in message.handoffs:
                sender = self.senders.get(self.link, handoff)
                if sender is not None:
                    sender.renew(self.now_s)

    def accept(self, start: StartHandoff) -> None:
        if self.senders.is_known(self.link, start.handoff):
            return
        num_blocks = check_start(start, BLOCK_SIZE)
        table = self.prefill_pool.reserve(num_blocks)
        if table is None:
            self.senders.refuse(self.link, start.handoff)
            failure = Failed(reason=Reason.OVERLOADED, message="no blocks")
            self.send_to_decode(HandoffRefused(handoff=start.handoff, failure=failure))
            return
        table.hold(0, num_blocks)
        sender = HandoffSender(
            start, block_table=table, memory=self.source, lease_s=LEASE_S, now_s=self.now_s
        )
        self.senders.add(self.link, sender)
        self.all_senders.append(sender)
        self.prefills[start.handoff] = Prefill(start, sender, table)

    @precondition(lambda self: self.prefills)
    @rule(data=st.data(), num_tokens=st.integers(1, 8), token_first=st.booleans())
    def compute(self, data: st.DataObject, num_tokens: int, token_first: bool) -> None:
        """A chunk of one prompt; it may finish after the handoff is over."""
        prefill = data.draw(st.sampled_from(list(self.prefills.values())), label="prefill")
        self.compute_chunk(prefill, num_tokens, token_first)

    def compute_chunk(self, prefill: Prefill, num_tokens: int, token_first: bool) -> None:
        start, sender = prefill.start, prefill.sender
        length = len(start.prompt_token_ids)
        end = min(length, prefill.num_computed + num_tokens)
        is_last = end == length
        for index in range(prefill.num_computed // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
            if not sender.is_over:
                block_id = prefill.table.block_ids[index]
                self.source.block(block_id)[:] = content(start.handoff, index)
        prefill.num_computed = end
        done = PrefillDone(
            handoff=start.handoff,
            first_token=SampledToken(7),
            queue_s=0.0,
            prefill_s=0.0,
            cached_tokens=0,
        )
        if is_last and token_first and sender.sampled():
            self.send_to_decode(done)
        offer = sender.offer(end, is_last=is_last)
        if offer is not None:
            self.send_to_decode(offer)
        if is_last and not token_first and sender.sampled():
            self.send_to_decode(done)
        if is_last or sender.is_over:
            del self.prefills[start.handoff]

    @precondition(lambda self: self.prefills)
    @rule(data=st.data(), is_failed=st.sampled_from([False, False, True]))
    def fail(self, data: st.DataObject, is_failed: bool) -> None:
        if not is_failed:
            return
        prefill = data.draw(st.sampled_from(list(self.prefills.values())), label="prefill")
        del self.prefills[prefill.start.handoff]
        if not prefill.sender.is_over:
            self.senders.end(self.link, prefill.start.handoff, Event.FAIL)
            self.send_failed(prefill.start.handoff)

    def send_failed(self, handoff: HandoffId) -> None:
        failure = Failed(reason=Reason.WORKER_LOST, message="gave up")
        self.send_to_decode(HandoffFailed(handoff=handoff, failure=failure))

    @rule(elapsed_s=st.sampled_from([0.5, 2.0, 4.0, 11.0]))
    def tick(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        due_s = self.senders.next_expiry_s()
        expired = self.senders.expire(self.now_s)
        assert bool(expired) == (due_s is not None and due_s <= self.now_s)
        for link, handoff in expired:
            assert link == self.link
            self.send_failed(handoff)

    # The link -----------------------------------------------------------------------------------

    def send_to_prefill(self, message: DecodeToPrefill) -> None:
        assert not isinstance(message, HandoffHello)
        handoff = message.handoffs[0] if isinstance(message, RenewLeases) else message.handoff
        if handoff in self.channels:
            self.channels[handoff].to_prefill.append(message)

    def send_to_decode(self, message: PrefillToDecode) -> None:
        assert not isinstance(message, HandoffHello)
        handoff = message.handoff
        if handoff in self.channels:
            self.channels[handoff].to_decode.append(message)

    @precondition(lambda self: any(one.to_prefill for one in self.channels.values()))
    @rule(data=st.data(), num_messages=st.integers(1, 3))
    def prefill_hears(self, data: st.DataObject, num_messages: int) -> None:
        waiting = [one for one in self.channels.values() if one.to_prefill]
        channel = data.draw(st.sampled_from(waiting), label="channel")
        for _ in range(min(num_messages, len(channel.to_prefill))):
            self.deliver_to_prefill(channel)

    @precondition(lambda self: any(one.to_decode for one in self.channels.values()))
    @rule(data=st.data(), num_messages=st.integers(1, 3))
    def decode_hears(self, data: st.DataObject, num_messages: int) -> None:
        waiting = [one for one in self.channels.values() if one.to_decode]
        channel = data.draw(st.sampled_from(waiting), label="channel")
        for _ in range(min(num_messages, len(channel.to_decode))):
            self.deliver_to_decode(channel)

    @precondition(lambda self: self.channels)
    @rule(data=st.data(), to_prefill=st.booleans())
    def repeat(self, data: st.DataObject, to_prefill: bool) -> None:
        """A message that was delivered before comes again."""
        channel = data.draw(st.sampled_from(list(self.channels.values())), label="channel")
        if to_prefill and channel.past_to_prefill:
            self.hear_at_prefill(data.draw(st.sampled_from(channel.past_to_prefill)))
        elif not to_prefill and channel.past_to_decode:
            self.hear_at_decode(data.draw(st.sampled_from(channel.past_to_decode)))

    def deliver_to_prefill(self, channel: Channel) -> None:
        channel.past_to_prefill.append(channel.to_prefill.popleft())
        self.hear_at_prefill(channel.past_to_prefill[-1])

    def deliver_to_decode(self, channel: Channel) -> None:
        channel.past_to_decode.append(channel.to_decode.popleft())
        self.hear_at_decode(channel.past_to_decode[-1])

    @rule(is_lost=st.sampled_from([False, False, False, True]))
    def drop_link(self, is_lost: bool) -> None:
        """All that was under way is lost, and both ends notice; rare, else nothing gets far."""
        if not is_lost:
            return
        self.channels.clear()
        self.senders.end_peer(self.link)
        self.link += 1
        for decode in list(self.decodes.values()):
            decode.receiver.lost()
            self.give_up_on(decode)

    # What always holds --------------------------------------------------------------------------

    @invariant()
    def pinned_blocks_are_those_of_open_handoffs(self) -> None:
        pinned = sum(sender.num_pinned_blocks for sender in self.all_senders)
        assert self.prefill_pool.usage().pinned == pinned

    @invariant()
    def landed_blocks_keep_their_content(self) -> None:
        for decode in self.decodes.values():
            self.check_landed(decode)

    def teardown(self) -> None:
        """Heal the link and let everything run out: all is over, and nothing is held."""
        self.transport.corrupt = 0
        for prefill in list(self.prefills.values()):
            self.compute_chunk(prefill, 1_000, token_first=True)
        for _ in range(1_000):
            for channel in self.channels.values():
                while channel.to_prefill:
                    self.deliver_to_prefill(channel)
                while channel.to_decode:
                    self.deliver_to_decode(channel)
            for prefill in list(self.prefills.values()):
                self.compute_chunk(prefill, 1_000, token_first=False)
            for decode in list(self.decodes.values()):
                self.step(decode)
            if not self.decodes and not len(self.senders):
                break
        assert all(receiver.is_over for receiver in self.all_receivers)
        assert all(sender.is_over for sender in self.all_senders)
        assert self.decode_pool.usage().is_idle
        assert self.prefill_pool.usage().is_idle
        self.source.close()
        self.target.close()


TestHandoffs = Handoffs.TestCase
TestHandoffs.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
