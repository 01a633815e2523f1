"""The decode side of a handoff: offered blocks are read, checked, and only then counted."""

from collections.abc import Callable, Sequence

from kvtransfer.digest import DIGEST_BYTES, block_digest
from kvtransfer.session import Event, HandoffSession, Phase, ProtocolViolation
from kvtransfer.threads import run_to_end
from kvtransfer.transports.base import Transport
from pdserve.domain.errors import Reason, TransferFailed
from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.invariants import check_invariant
from pdserve.domain.messages import (
    BlocksOffered,
    BlocksPulled,
    EndHandoff,
    PrefillDone,
    RemoteRegion,
    Role,
)
from pdserve.engine.kv_memory import KvMemory


class HandoffReceiver:
    """One handoff at the decode worker, from the moment its start is sent.

    `local_blocks` take the prompt's blocks from `first_block` on, in order; the caller has
    reserved them and keeps them until no `land` is running. Local blocks below
    `num_landed_blocks` are exactly what the prefill worker computed; the others hold anything.
    """

    def __init__(
        self,
        handoff: HandoffId,
        *,
        transport: Transport,
        region: RemoteRegion,
        memory: KvMemory,
        local_blocks: Sequence[BlockId],
        first_block: int,
        thread_above_bytes: int = 1 << 20,
    ) -> None:
        check_invariant(len(local_blocks) > 0, "a handoff moves at least one block", handoff)
        self.handoff = handoff
        self.num_landed_blocks = 0
        self.num_corrupt_blocks = 0  # each time one did not match its digest
        self.num_bytes = 0  # read from the peer, second reads included
        self._transport = transport
        self._region = region
        self._memory = memory
        self._local_blocks = tuple(local_blocks)
        self._first_block = first_block
        self._thread_above_bytes = thread_above_bytes
        self._is_landing = False
        self._done: PrefillDone | None = None
        self._session = HandoffSession(Role.DECODE)
        self._session.say(Event.START)

    @property
    def phase(self) -> Phase:
        return self._session.phase

    @property
    def is_over(self) -> bool:
        return self._session.is_over

    @property
    def num_late(self) -> int:
        """Messages dropped because they came again or after the end."""
        return self._session.num_late

    @property
    def is_complete(self) -> bool:
        """All blocks are there."""
        return self.num_landed_blocks == len(self._local_blocks)

    @property
    def is_ready(self) -> bool:
        """All blocks and the first token are there: decoding can begin."""
        return self.phase in (Phase.READY, Phase.COMPLETED)

    async def land(self, offer: BlocksOffered) -> BlocksPulled:
        """Read and check one offer; the answer tells the peer that it may unpin.

        Offers are landed one at a time, in the order they came. A block that does not match its
        digest is read once more. Raises `TransferFailed`: KV_INTEGRITY if it still does not match,
        `ProtocolViolation` for an offer that was not asked for. After the call, cancelled or not,
        nothing writes to the local blocks.
        """
        check_invariant(not self._is_landing, "offers land one at a time", self.handoff)
        self._is_landing = True
        try:
            return await self._land(offer)
        finally:
            self._is_landing = False

    async def _land(self, offer: BlocksOffered) -> BlocksPulled:
        if self.is_over:
            self._session.num_late += 1
            raise TransferFailed("the handoff is over", reason=Reason.FENCED)
        self._check(offer)
        pulled = BlocksPulled(
            handoff=self.handoff,
            first_block=offer.first_block,
            num_blocks=len(offer.block_ids),
        )
        if offer.first_block < self._next_block:
            self._session.num_late += 1
            return pulled
        self._session.hear(Event.OFFER)
        corrupt = await self._read(offer, range(len(offer.block_ids)))
        if corrupt:
            corrupt = await self._read(offer, corrupt)
        if corrupt:
            raise TransferFailed(
                f"{len(corrupt)} of {len(offer.block_ids)} blocks do not match their digests",
                reason=Reason.KV_INTEGRITY,
            )
        if self.is_over:
            raise TransferFailed("the handoff ended while blocks were read", reason=Reason.FENCED)
        self.num_landed_blocks += len(offer.block_ids)
        self._session.say(Event.PULL_LAST if self.is_complete else Event.PULL)
        return pulled

    @property
    def _next_block(self) -> int:
        return self._first_block + self.num_landed_blocks

    def _check(self, offer: BlocksOffered) -> None:
        """Raise `ProtocolViolation` unless this is the next offer, or one that has landed."""
        first, end = offer.first_block, offer.first_block + len(offer.block_ids)
        is_asked = self._first_block <= first < end <= self._first_block + len(self._local_blocks)
        is_in_turn = first == self._next_block or end <= self._next_block
        if offer.handoff != self.handoff or not is_asked or not is_in_turn:
            raise ProtocolViolation(
                f"blocks {first} to {end} offered where {self._next_block} was next"
            )
        if not all(0 <= block < self._region.num_blocks for block in offer.block_ids):
            raise ProtocolViolation(f"a block beyond {self._region.num_blocks} offered")
        lengths = [len(digest) for digest in offer.digests]
        if lengths != [DIGEST_BYTES] * len(offer.block_ids):
            raise ProtocolViolation(f"{len(lengths)} digests for {len(offer.block_ids)} blocks")

    async def _read(self, offer: BlocksOffered, places: Sequence[int]) -> list[int]:
        """Read these places of the offer; returns those that do not match their digests."""
        start = offer.first_block - self._first_block
        await self._transport.read(
            self._region,
            [offer.block_ids[place] for place in places],
            self._memory,
            [self._local_blocks[start + place] for place in places],
        )
        num_bytes = len(places) * self._memory.layout.block_bytes
        self.num_bytes += num_bytes

        def find_corrupt(is_cancelled: Callable[[], bool]) -> list[int]:
            return [place for place in places if not (is_cancelled() or self._holds(offer, place))]

        if num_bytes > self._thread_above_bytes:
            corrupt = await run_to_end(find_corrupt)
        else:
            corrupt = find_corrupt(lambda: False)
        self.num_corrupt_blocks += len(corrupt)
        return corrupt

    def _holds(self, offer: BlocksOffered, place: int) -> bool:
        block_index = offer.first_block + place
        content = self._memory.block(self._local_blocks[block_index - self._first_block])
        return block_digest(self.handoff, block_index, content) == offer.digests[place]

    def done(self, message: PrefillDone) -> bool:
        """The first token came; False if it came before or too late, and is to be dropped."""
        if message == self._done:
            self._session.num_late += 1
            return False
        if not self._session.hear(Event.SAMPLE):
            return False
        self._done = message
        return True

    def refused(self) -> bool:
        """The prefill worker will not do it; False if that came too late to matter."""
        return self._session.hear(Event.REFUSE)

    def failed(self) -> bool:
        """The prefill worker gave up; False if that came too late to matter."""
        return self._session.hear(Event.FAIL)

    def lost(self) -> None:
        """The stream to the prefill worker is gone; harmless when called again."""
        if not self.is_over:
            self._session.say(Event.LOSE)

    def end(self) -> EndHandoff | None:
        """This side needs nothing more, whatever the phase: returns the message to send.

        None if the peer has ended it, or was told. Cancel a running `land` and await it before.
        """
        check_invariant(not self._is_landing, "no block is written after the end", self.handoff)
        if self.is_over:
            return None
        self._session.say(Event.END)
        return EndHandoff(handoff=self.handoff)
