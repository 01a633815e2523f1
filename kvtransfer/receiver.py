"""The decode side of a handoff: offered blocks are read, checked, and only then counted."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvtransfer.landing import Landing
from kvtransfer.parts import PartReader
from kvtransfer.reading import BlockRead, BlockReader
from kvtransfer.session import Event, HandoffSession, Phase, ProtocolViolation
from pdserve.domain.errors import PdserveError, PeerFault, Reason, Refused, TransferFailed
from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.invariants import check_invariant
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.messages import (
    BlocksForming,
    BlocksOffered,
    BlocksPulled,
    EndHandoff,
    HandoffFailed,
    HandoffRefused,
    KvMoved,
    PrefillDone,
    PrefillToHandoff,
    Role,
)
from pdserve.domain.tokens import Failed
from pdserve.engine.digest import DIGEST_BYTES


class HandoffReceiver:
    """One handoff at the decode worker, from the moment its start is sent.

    `hear` takes all that the prefill worker says of it, at once; `wait_offer` and `land` are for
    the one task that moves the blocks, and end as soon as the handoff does. `on_first_token` is
    called within `hear`, at most once, and returns whether the blocks are still needed.

    `landing` takes the prompt's tokens, of which there are `num_tokens`, from the first one of its
    blocks on; the caller has reserved the blocks and keeps them until no `land` is running. What
    they have of tokens below `num_landed_tokens` is exactly what the prefill worker computed; the
    rest is anything. Blocks that are asked for, offered and pulled are the prefill worker's, whose
    size may be another.
    """

    def __init__(
        self,
        handoff: HandoffId,
        *,
        reader: BlockReader,
        landing: Landing,
        num_tokens: int,
        vocab_size: int,
        on_first_token: Callable[[PrefillDone], bool],
    ) -> None:
        is_some = landing.first_token < num_tokens <= landing.end_token
        check_invariant(is_some, "a handoff moves what is left of a prompt", handoff, landing)
        self.handoff = handoff
        self.first_block = landing.first_token // reader.block_size  # that is asked for
        self.num_landed_blocks = 0
        self.num_corrupt_blocks = 0  # each time one did not match its digest
        self.num_bytes = 0  # read from the peer, second reads included
        self.num_retried_bytes = 0  # of these, second reads
        self._reader = reader
        self._landing = landing
        self._num_tokens = num_tokens
        self._end_block = num_blocks_for(num_tokens, reader.block_size)
        self._vocab_size = vocab_size
        self._on_first_token = on_first_token
        self._next_offer = self.first_block
        self._offers: deque[BlocksOffered] = deque()
        self._parts = reader.parts
        self._gave_up_parts = False  # what is left to read by takes whole blocks only
        self._forming: BlocksForming | None = None  # what was said last of the prompt's last blocks
        self._num_read_parts = 0  # of each of them
        self._done: PrefillDone | None = None
        self._fault: PdserveError | None = None
        self._is_answered = False  # by the first token: the blocks are not needed
        self._has_news = asyncio.Event()
        self._reading: asyncio.Timeout | None = None
        self._session = HandoffSession(Role.DECODE)
        self._session.say(Event.START)

    @property
    def phase(self) -> Phase:
        return self._session.phase

    @property
    def reads_parts(self) -> bool:
        """What is forming is of use."""
        return self._parts is not None

    @property
    def is_complete(self) -> bool:
        """All blocks are there."""
        return self.first_block + self.num_landed_blocks == self._end_block

    @property
    def moved(self) -> KvMoved:
        return KvMoved(
            moved_bytes=self.num_bytes,
            skipped_bytes=self.first_block * self._reader.block_bytes,
            retried_bytes=self.num_retried_bytes,
        )

    @property
    def num_landed_tokens(self) -> int:
        """Of the prompt, counted from its start."""
        landed = (self.first_block + self.num_landed_blocks) * self._reader.block_size
        return max(self._landing.first_token, min(landed, self._num_tokens))

    @property
    def _is_ready(self) -> bool:
        """All blocks and the first token are there: decoding can begin."""
        return self.phase in (Phase.READY, Phase.COMPLETED)

    @property
    def _is_going(self) -> bool:
        """More is to come, and is waited for."""
        return not (self._session.is_over or self._is_answered or self._fault)

    def hear(self, message: PrefillToHandoff) -> bool:
        """Take a message of this handoff; False if it came late, or again, and is dropped.

        Raises `ProtocolViolation` for what no correct peer says; the caller ends the handoff.
        """
        match message:
            case BlocksOffered():
                return self._hear_offer(message)
            case BlocksForming():
                return self._hear_forming(message)
            case PrefillDone():
                return self._hear_first_token(message)
            case HandoffRefused():
                return self._hear_end(Event.REFUSE, _refusal(message.failure))
            case HandoffFailed():
                failure = message.failure
                return self._hear_end(Event.FAIL, PeerFault(failure.message, reason=failure.reason))

    def _hear_offer(self, offer: BlocksOffered) -> bool:
        if not self._is_going:
            return False
        first, end = offer.first_block, offer.first_block + len(offer.block_ids)
        if not self.first_block <= first < end <= self._end_block:
            raise ProtocolViolation(f"blocks {first} to {end} offered, which were not asked for")
        if end <= self._next_offer:
            return False
        if first != self._next_offer:
            raise ProtocolViolation(f"block {first} offered where {self._next_offer} was next")
        if not all(0 <= block < self._reader.num_blocks for block in offer.block_ids):
            raise ProtocolViolation(f"a block beyond {self._reader.num_blocks} offered")
        num_blocks, num_digests = len(offer.block_ids), len(offer.digests)
        if num_digests != num_blocks:
            raise ProtocolViolation(f"{num_digests} digests for {num_blocks} blocks")
        num_bytes = DIGEST_BYTES * self._reader.num_ranks
        if not all(len(digest) == num_bytes for digest in offer.digests):
            raise ProtocolViolation(f"a digest of other than {num_bytes} bytes offered")
        self._session.hear(Event.OFFER)
        self._next_offer = end
        self._offers.append(offer)
        self._has_news.set()
        return True

    def _hear_forming(self, forming: BlocksForming) -> bool:
        if not self._is_going:
            return False
        first, end = forming.first_block, forming.first_block + len(forming.block_ids)
        if self._parts is None:
            raise ProtocolViolation("parts of blocks announced, which were not asked for")
        if not self.first_block <= first < end == self._end_block:
            raise ProtocolViolation(f"blocks {first} to {end} are forming, and not the last ones")
        if not 0 < forming.num_ready_parts <= self._parts.num_parts:
            raise ProtocolViolation(f"{forming.num_ready_parts} of {self._parts.num_parts} parts")
        if not all(0 <= block < self._reader.num_blocks for block in forming.block_ids):
            raise ProtocolViolation(f"a block beyond {self._reader.num_blocks} is forming")
        before = self._forming
        if before and (before.first_block, before.block_ids) != (first, forming.block_ids):
            raise ProtocolViolation("other blocks are forming than before")
        if first < self._next_offer:
            return False
        if before and forming.num_ready_parts <= before.num_ready_parts:
            return False
        self._forming = forming
        self._has_news.set()
        return True

    def _hear_first_token(self, message: PrefillDone) -> bool:
        if not self._is_going or message == self._done:
            return False
        if not 0 <= message.first_token.token_id < self._vocab_size:
            raise ProtocolViolation(f"a first token at or above {self._vocab_size}")
        if not message.first_token.is_finite:
            raise ProtocolViolation("a log-probability that is not finite")
        self._session.hear(Event.SAMPLE)
        self._done = message
        if not self._on_first_token(message):
            self._is_answered = True
            self._interrupt()
        self._has_news.set()
        return True

    def _hear_end(self, event: Event, fault: PdserveError) -> bool:
        if not self._session.hear(event):
            return False
        self.fail(fault)
        return True

    def lose(self, fault: PdserveError) -> None:
        """The stream to the prefill worker is gone; harmless when called again."""
        if not self._session.is_over:
            self._session.say(Event.LOSE)
            self.fail(fault)

    def fail(self, fault: PdserveError) -> None:
        """Have the task that moves the blocks raise `fault`, unless nothing is missing."""
        if self._fault is None and not self._is_ready:
            self._fault = fault
            self._interrupt()

    def _interrupt(self) -> None:
        self._has_news.set()
        if self._reading is not None and self._reading.when() is None:
            self._reading.reschedule(0.0)

    @property
    def _has_parts_to_read(self) -> bool:
        """Parts are final of blocks that are not offered yet."""
        forming = self._forming
        return (
            forming is not None
            and not self._gave_up_parts
            and forming.first_block >= self._next_offer
            and forming.num_ready_parts > self._num_read_parts
        )

    async def wait_offer(self) -> bool:
        """Wait until there are blocks to `land`; False when nothing more is needed.

        Raises why the handoff failed: `PeerFault`, `Refused`, or what `fail` was told.
        """
        while True:
            if self._fault is not None:
                raise self._fault
            if self._is_ready or self._is_answered:
                return False
            if self._offers or self._has_parts_to_read:
                return True
            self._has_news.clear()
            await self._has_news.wait()

    async def land(self) -> BlocksPulled | None:
        """Read and check the oldest offer; the answer tells the peer that it may unpin.

        While there is none, read the parts that are final of blocks that are being computed: None.

        A block that does not match its digest is read once more. Raises as `wait_offer` does, and
        `TransferFailed`: KV_INTEGRITY for a block that still does not match. None if the answer
        turned out to need no blocks. After the call, cancelled or not, nothing writes to the
        local blocks.
        """
        check_invariant(self._reading is None, "offers land one at a time", self.handoff)
        try:
            async with asyncio.timeout(None) as self._reading:  # ended by `_interrupt`
                if not self._offers:
                    await self._read_parts()
                    return None
                return await self._land(self._offers.popleft())
        except (TimeoutError, TransferFailed):
            if self._fault is not None:
                raise self._fault from None
            if self._is_answered:
                return None
            raise
        finally:
            self._reading = None

    async def _land(self, offer: BlocksOffered) -> BlocksPulled:
        num_whole = len(offer.block_ids)
        if self._forming is not None and self._num_read_parts:
            num_whole = min(num_whole, max(0, self._forming.first_block - offer.first_block))
        corrupt = await self._read(offer, range(num_whole)) if num_whole else []
        corrupt += await self._complete(offer, range(num_whole, len(offer.block_ids)))
        if corrupt:
            num_bytes = self.num_bytes
            corrupt = await self._read(offer, corrupt)
            self.num_retried_bytes += self.num_bytes - num_bytes
        if corrupt:
            raise TransferFailed(
                f"{len(corrupt)} of {len(offer.block_ids)} blocks do not match their digests",
                reason=Reason.KV_INTEGRITY,
            )
        self.num_landed_blocks += len(offer.block_ids)
        self._session.say(Event.PULL_LAST if self.is_complete else Event.PULL)
        return BlocksPulled(
            handoff=self.handoff,
            first_block=offer.first_block,
            num_blocks=len(offer.block_ids),
        )

    async def _read_parts(self) -> None:
        """What is announced of the forming blocks and not there yet."""
        forming, parts = self._forming, self._parts
        if forming is None or parts is None or not self._has_parts_to_read:
            return
        end = forming.num_ready_parts
        if await self._move_parts(parts, forming, range(self._num_read_parts, end)):
            self._num_read_parts = end

    async def _move_parts(
        self, reader: PartReader, blocks: BlocksForming | BlocksOffered, parts: range
    ) -> bool:
        """False if the transport that is left has no parts: then none are read any more."""
        local_blocks = self._own_blocks(blocks.first_block, len(blocks.block_ids))
        if not await reader.read(blocks.block_ids, local_blocks, parts):
            num_blocks = self._end_block - blocks.first_block
            self.num_retried_bytes += num_blocks * self._num_read_parts * reader.part_bytes
            self._gave_up_parts, self._num_read_parts = True, 0
            return False
        self.num_bytes += len(blocks.block_ids) * len(parts) * reader.part_bytes
        self._check_going()
        return True

    def _own_blocks(self, first_block: int, num_blocks: int) -> Sequence[BlockId]:
        """Of blocks that have parts; the peer's are of the size of ours."""
        first = first_block - self._landing.first_block
        return self._landing.blocks[first : first + num_blocks]

    def _check_going(self) -> None:
        """Else the peer may have given the blocks to another while they were read."""
        if not self._is_going:
            raise TransferFailed("the handoff ended while blocks were read", reason=Reason.FENCED)

    async def _complete(self, offer: BlocksOffered, places: range) -> list[int]:
        """Read what is missing of blocks that were read in part; those that do not match."""
        reader = self._parts
        if reader is None or not places:
            return []
        rest = replace(
            offer,
            first_block=offer.first_block + places.start,
            block_ids=offer.block_ids[places.start :],
            digests=offer.digests[places.start :],
        )
        missing = range(self._num_read_parts, reader.num_parts)
        if missing and not await self._move_parts(reader, rest, missing):
            return await self._read(offer, places)
        indices = [offer.first_block + place for place in places]
        local_blocks = self._own_blocks(rest.first_block, len(places))
        found = await reader.digests(self.handoff, indices, local_blocks)
        self._check_going()
        both = zip(places, found, strict=True)
        corrupt = [place for place, digest in both if digest != offer.digests[place]]
        self.num_corrupt_blocks += len(corrupt)
        return corrupt

    async def _read(self, offer: BlocksOffered, places: Sequence[int]) -> list[int]:
        """Read these places of the offer; returns those that do not match their digests."""
        corrupt = await self._reader.read(
            BlockRead(
                handoff=self.handoff,
                block_size=self._reader.block_size,
                indices=[offer.first_block + place for place in places],
                remote_blocks=[offer.block_ids[place] for place in places],
                digests=[offer.digests[place] for place in places],
                landing=self._landing,
            )
        )
        self.num_bytes += len(places) * self._reader.block_bytes
        self._check_going()
        self.num_corrupt_blocks += len(corrupt)
        return [places[number] for number in sorted(corrupt)]

    def end(self) -> EndHandoff | None:
        """This side needs nothing more, whatever the phase: returns the message to send.

        None if the peer has ended it, the stream is lost, or the message was returned before.
        Cancel a running `land` and await it before.
        """
        check_invariant(self._reading is None, "no block is written after the end", self.handoff)
        if self._session.is_over:
            return None
        self._session.say(Event.END)
        return EndHandoff(handoff=self.handoff)


def _refusal(failure: Failed) -> PeerFault | Refused:
    if failure.reason is Reason.INTERNAL:
        return PeerFault(failure.message, reason=failure.reason)
    return Refused(failure.message, reason=failure.reason, retry_after_s=failure.retry_after_s)
