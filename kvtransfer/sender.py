"""The prefill side of handoffs: what is offered, for how long, and when it is given back.

A block is pinned from before it is digested until the peer says it is pulled, or the handoff ends.
Nothing here waits but for digests: `now_s` is any monotonic clock of this process.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from kvtransfer.session import ENDINGS, SAID_BY, Event, HandoffSession, Phase, ProtocolViolation
from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.invariants import check_invariant
from pdserve.domain.messages import BlocksForming, BlocksOffered, BlocksPulled, Role, StartHandoff
from pdserve.engine.kv_store import KvBlocks

PeerT = TypeVar("PeerT", bound=Hashable)

MAX_OFFERED_BLOCKS = 8192
"""In one message: with a digest from each of `MAX_NUM_RANKS` ranks they are half of the largest."""


class BlockTableLike(Protocol):
    """A prompt's blocks in logical order, block 0 first, held until `release`."""

    @property
    def block_ids(self) -> Sequence[BlockId]: ...

    def pin(self, first: int, count: int) -> None: ...

    def unpin(self, first: int, count: int) -> None: ...

    def release(self) -> None: ...


def check_start(start: StartHandoff, block_size: int) -> int:
    """How many blocks the prompt has; raises `ProtocolViolation` if it asks for none of them."""
    num_blocks = -(-len(start.prompt_token_ids) // block_size)
    if not 0 <= start.first_block < num_blocks:
        raise ProtocolViolation(f"block {start.first_block} of {num_blocks} asked as the first")
    return num_blocks


class HandoffSender:
    """One handoff at the prefill worker. Owns the block table: `end` gives it back, once.

    Raises `ProtocolViolation` if `start` makes no sense; the table then stays the caller's.
    """

    def __init__(
        self,
        start: StartHandoff,
        *,
        block_table: BlockTableLike,
        memory: KvBlocks,
        block_size: int,
        lease_s: float,
        now_s: float,
    ) -> None:
        self.handoff = start.handoff
        self._block_size = block_size
        self._num_blocks = check_start(start, self._block_size)
        is_covered = self._num_blocks <= len(block_table.block_ids)
        check_invariant(is_covered, "the table covers the prompt", start.handoff, self._num_blocks)
        self._block_table = block_table
        self._memory = memory
        self._lease_s = lease_s
        self._ends_at_s = now_s + start.deadline_s  # nobody waits longer, whatever is renewed
        self.renew(now_s)
        self._first_block = start.first_block
        self._next_offer = start.first_block
        self._first_forming = self._num_blocks  # blocks from here on are pinned before their offer
        self.reads_parts = start.reads_parts
        self._next_pull = start.first_block
        self._offered: set[BlockId] = set()
        self._session = HandoffSession(Role.PREFILL)
        self._session.hear(Event.START)

    @property
    def phase(self) -> Phase:
        return self._session.phase

    @property
    def is_over(self) -> bool:
        return self._session.is_over

    def form(self, num_computed_tokens: int, num_ready_parts: int) -> BlocksForming | None:
        """Pin and name the blocks that the prompt's last chunk fills, from that token on.

        Of each the first `num_ready_parts` parts are final. None if the peer has no use for it, it
        is over, or the blocks are offered.
        """
        first = max(num_computed_tokens // self._block_size, self._first_block)
        if self.is_over or not self.reads_parts or first < self._next_offer:
            return None
        is_same = self._first_forming in (first, self._num_blocks)
        check_invariant(is_same, "one chunk is the last", self.handoff, first)
        block_ids = tuple(self._block_table.block_ids[first : self._num_blocks])
        if self._first_forming == self._num_blocks:
            self._first_forming = first
            self._block_table.pin(first, self._num_blocks - first)
            self._offered.update(block_ids)
        return BlocksForming(
            handoff=self.handoff,
            first_block=first,
            block_ids=block_ids,
            num_ready_parts=num_ready_parts,
        )

    async def offer(self, num_computed_tokens: int, *, is_last: bool) -> BlocksOffered | None:
        """Pin and describe the blocks that became complete; None if there are none, or it is over.

        `is_last` means the whole prompt is computed, and adds its partial last block. One offer is
        made at a time, of `MAX_OFFERED_BLOCKS` at most: call again until there are none. If the
        handoff ends meanwhile, `end` has given the blocks back: who shares them out keeps them from
        others until this call is over.
        """
        if self.is_over:
            return None
        first = self._next_offer
        end = self._num_blocks if is_last else num_computed_tokens // self._block_size
        is_within = end <= self._num_blocks
        check_invariant(is_within, "only the prompt is offered", self.handoff, num_computed_tokens)
        if end <= first:
            return None
        end = min(end, first + MAX_OFFERED_BLOCKS)
        block_ids = tuple(self._block_table.block_ids[first:end])
        if (unpinned := min(end, self._first_forming) - first) > 0:
            self._block_table.pin(first, unpinned)
        digests = await self._memory.digests(self.handoff, range(first, end), block_ids)
        if self.is_over:
            return None
        self._session.say(Event.OFFER)
        self._offered.update(block_ids)
        self._next_offer = end
        return BlocksOffered(
            handoff=self.handoff, first_block=first, block_ids=block_ids, digests=tuple(digests)
        )

    def sampled(self) -> bool:
        """The first token is there; False if the handoff is over and nobody waits for it."""
        if self.is_over:
            return False
        self._session.say(Event.SAMPLE)
        return True

    def pulled(self, message: BlocksPulled) -> bool:
        """Unpin what the peer has; False if it said so before, or after the end.

        Raises `ProtocolViolation` if it cannot have that.
        """
        first, end = message.first_block, message.first_block + message.num_blocks
        if message.num_blocks < 1 or first < 0 or end > self._next_offer:
            raise ProtocolViolation(f"blocks {first} to {end} pulled but not offered")
        if self.is_over or end <= self._next_pull:
            return False
        if first != self._next_pull:
            raise ProtocolViolation(f"block {first} pulled where {self._next_pull} was next")
        self._session.hear(Event.PULL_LAST if end == self._num_blocks else Event.PULL)
        self._block_table.unpin(first, end - first)
        self._offered.difference_update(self._block_table.block_ids[first:end])
        self._next_pull = end
        return True

    def renew(self, now_s: float) -> None:
        """Another lease from now, within the deadline of the request."""
        self.expires_at_s = min(now_s + self._lease_s, self._ends_at_s)

    def is_expired(self, now_s: float) -> bool:
        return not self.is_over and now_s >= self.expires_at_s

    def not_offered(self, block_ids: set[BlockId]) -> set[BlockId]:
        """Those of `block_ids` that may not be read on behalf of this handoff."""
        return block_ids - self._offered

    def end(self, cause: Event) -> None:
        """Give every block back, pinned or not; harmless when called again.

        `cause` is how it ended: END (the peer said so), FAIL, EXPIRE or LOSE.
        """
        check_invariant(cause in ENDINGS, "an ending ends", cause)
        if self.is_over:
            return
        if SAID_BY.get(cause) is Role.DECODE:
            self._session.hear(cause)
        else:
            self._session.say(cause)
        self._offered.clear()
        self._block_table.release()


class SenderTable(Generic[PeerT]):
    """All handoffs of a prefill worker that are not over.

    `peer` names the stream a handoff came in on. A peer reaches only its own handoffs: another's
    are unknown to it.
    """

    def __init__(
        self,
        *,
        max_num_past: int = 4096,
        on_end: Callable[["HandoffSender"], None] = lambda sender: None,
    ) -> None:
        """`on_end` hears of each handoff that was added and ended."""
        self._on_end = on_end
        self._max_num_past = max_num_past
        self._live: dict[tuple[PeerT, HandoffId], HandoffSender] = {}
        self._past: OrderedDict[tuple[PeerT, HandoffId], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def is_known(self, peer: PeerT, handoff: HandoffId) -> bool:
        """Whether a start of this name came before, so that another is a duplicate."""
        return (peer, handoff) in self._live or (peer, handoff) in self._past

    def add(self, peer: PeerT, sender: HandoffSender) -> None:
        is_new = not self.is_known(peer, sender.handoff)
        check_invariant(is_new, "a handoff starts once", sender.handoff)
        self._live[peer, sender.handoff] = sender

    def remember(self, peer: PeerT, handoff: HandoffId) -> None:
        """It is over, begun or not: should its start come again, nobody waits for it any more."""
        is_live = (peer, handoff) in self._live
        check_invariant(not is_live, "a live handoff is ended first", handoff)
        self._past[peer, handoff] = None
        if len(self._past) > self._max_num_past:
            self._past.popitem(last=False)

    def get(self, peer: PeerT, handoff: HandoffId) -> HandoffSender | None:
        """The live handoff that a message is for; None if the message is late."""
        return self._live.get((peer, handoff))

    def end(self, peer: PeerT, handoff: HandoffId, cause: Event) -> bool:
        """End and forget one handoff; False if it is over."""
        sender = self._live.pop((peer, handoff), None)
        if sender is None:
            return False
        self.remember(peer, handoff)
        sender.end(cause)
        self._on_end(sender)
        return True

    def may_read(self, block_ids: Sequence[BlockId]) -> bool:
        """Whether every block is offered, and pinned, by some handoff."""
        missing = set(block_ids)
        for sender in self._live.values():
            if not missing:
                break
            missing = sender.not_offered(missing)
        return not missing

    def end_peer(self, peer: PeerT) -> None:
        """A stream is gone: end all it carried."""
        ended = [key for key in self._live if key[0] == peer]
        for key in ended:
            self.end(*key, Event.LOSE)
        for key in [key for key in self._past if key[0] == peer]:
            del self._past[key]

    def expire(self, now_s: float) -> list[tuple[PeerT, HandoffId]]:
        """End every handoff whose lease is out."""
        expired = [key for key, sender in self._live.items() if sender.is_expired(now_s)]
        for key in expired:
            self.end(*key, Event.EXPIRE)
        return expired

    def next_expiry_s(self) -> float | None:
        """When `expire` will next have something to do, unless a lease is renewed before."""
        return min((sender.expires_at_s for sender in self._live.values()), default=None)
