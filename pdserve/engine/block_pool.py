"""Who owns which KV block, and which blocks can be found again by their content.

The life of a block, seen by one table that owns it:

                reserve            hold               pin
      free ───────────────▶ reserved ─────▶ held ─────────────▶ pinned
      ▲ ▲ │                    │            ▲ │ ◀───────────────  │
      │ │ └───── share ────────┼────────────┘ │      unpin        │
      │ └────────release───────┘              │                   │
      └──────────release──────────────────────┴───── release ─────┘

- reserved: promised to a request; its content is not there yet
- held: has the request's KV, or gets it from the request's own steps
- pinned: offered to a peer, which may be reading it
- free: nobody's. A free block with a published name is *cached*: its content can be shared by
  name until the block is evicted, least recently used first.

Several tables share a block that was found by name; the block is in the strongest of their states
(pinned > held > reserved). free + reserved + held + pinned is the number of blocks at all times.

After vLLM's `BlockPool` (v1/core/block_pool.py), with reservation and pinning made states.
"""

import itertools
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from enum import Enum, IntEnum, auto

from pdserve.domain.ids import BlockId
from pdserve.domain.invariants import check_invariant
from pdserve.domain.kv_usage import KvUsage


class BlockState(IntEnum):
    """Ordered by strength."""

    FREE = 0
    RESERVED = 1
    HELD = 2
    PINNED = 3


class BlockEvent(Enum):
    RESERVE = auto()
    SHARE = auto()
    HOLD = auto()
    PIN = auto()
    UNPIN = auto()
    RELEASE = auto()


NEXT: dict[tuple[BlockState, BlockEvent], BlockState] = {
    (BlockState.FREE, BlockEvent.RESERVE): BlockState.RESERVED,
    (BlockState.FREE, BlockEvent.SHARE): BlockState.HELD,
    (BlockState.RESERVED, BlockEvent.HOLD): BlockState.HELD,
    (BlockState.HELD, BlockEvent.PIN): BlockState.PINNED,
    (BlockState.PINNED, BlockEvent.UNPIN): BlockState.HELD,
    (BlockState.RESERVED, BlockEvent.RELEASE): BlockState.FREE,
    (BlockState.HELD, BlockEvent.RELEASE): BlockState.FREE,
    (BlockState.PINNED, BlockEvent.RELEASE): BlockState.FREE,
}


AreSound = Callable[[Sequence[BlockId]], Awaitable[list[bool]]]
"""Whether each block may be shared; see `pdserve.engine.kv_store.KvBlocks.are_sound`."""


async def all_sound(block_ids: Sequence[BlockId]) -> list[bool]:
    """For a pool whose blocks hold no numbers."""
    return [True] * len(block_ids)


class BlockTable:
    """One request's blocks in logical order. One owner, who must call `release` in the end.

    A transition that the table above does not have is a bug of the caller (`BrokenInvariant`).
    """

    __slots__ = ("_block_ids", "_num_published", "_pool", "_states", "num_cached_blocks")

    def __init__(
        self, pool: "BlockPool", block_ids: tuple[BlockId, ...], states: list[BlockState]
    ) -> None:
        self._pool = pool
        self._block_ids = block_ids
        self._states = states
        self.num_cached_blocks = states.count(BlockState.HELD)
        self._num_published = 0

    @property
    def block_ids(self) -> tuple[BlockId, ...]:
        """Empty once released."""
        return self._block_ids

    def hold(self, first: int, count: int) -> None:
        """Their content is there, or is being computed here: reserved -> held."""
        self._apply(BlockEvent.HOLD, range(first, first + count))

    def pin(self, first: int, count: int) -> None:
        """A peer may read them: held -> pinned."""
        self._apply(BlockEvent.PIN, range(first, first + count))

    def unpin(self, first: int, count: int) -> None:
        """The peer is done: pinned -> held."""
        self._apply(BlockEvent.UNPIN, range(first, first + count))

    async def publish(self, names: Sequence[bytes]) -> None:
        """Let logical block i be found as `names[i]`; they must be full, computed and held.

        Naming a block again is harmless, and costs nothing: a prompt is named bit by bit. Of two
        blocks with one name the first stays findable. The table is released after the call.
        """
        first = self._num_published
        states = self._states[first : len(names)]
        are_held = len(names) <= len(self._block_ids) and all(
            state >= BlockState.HELD for state in states
        )
        check_invariant(are_held, "named blocks are held", len(names), self._states)
        named = list(zip(self._block_ids[first:], names[first:], strict=False))
        sound = await self._pool._sound_of(named)
        self._num_published = first + self._pool._name(named, sound)

    def release(self) -> None:
        """Give all blocks back; harmless when called again.

        The last logical block goes first, so that eviction shortens a cached prefix from its end.
        """
        self._apply(BlockEvent.RELEASE, range(len(self._block_ids) - 1, -1, -1))
        self._block_ids, self._states = (), []

    def _apply(self, event: BlockEvent, places: range) -> None:
        """All or nothing: every pair is looked up before any block moves."""
        are_ours = not places or 0 <= min(places) <= max(places) < len(self._block_ids)
        check_invariant(are_ours, "a table moves its own blocks", places, len(self._block_ids))
        olds = [self._states[place] for place in places]
        is_legal = all((old, event) in NEXT for old in set(olds))
        check_invariant(is_legal, "blocks move by NEXT", event, places, self._states)
        nexts = {old: NEXT[old, event] for old in set(olds)}
        for place, old in zip(places, olds, strict=True):
            self._states[place] = nexts[old]
        ids = iter([self._block_ids[place] for place in places])
        for old, run in itertools.groupby(olds):  # most often one
            blocks = list(itertools.islice(ids, len(list(run))))
            self._pool._move(blocks, old, nexts[old])


class BlockPool:
    """Hands out blocks 0 to `num_blocks - 1` and counts them.

    No call waits but `BlockTable.publish`, which has to look into blocks.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        reuse_prefixes: bool = True,
        are_sound: AreSound = all_sound,
    ) -> None:
        """A block that is not sound when it is to be named, nor one after it, gets no name."""
        self.num_blocks = num_blocks
        self._are_sound = are_sound
        self._reuse_prefixes = reuse_prefixes
        self._unnamed = [BlockId(block) for block in range(num_blocks - 1, -1, -1)]
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # free and named, oldest first
        self._name_to_block: dict[bytes, BlockId] = {}
        self._block_to_name: dict[BlockId, bytes] = {}
        self._owners = [[0] * len(BlockState) for _ in range(num_blocks)]  # tables in each state
        self._num_in = [num_blocks, 0, 0, 0]

    @property
    def num_free(self) -> int:
        return self._num_in[BlockState.FREE]

    def usage(self) -> KvUsage:
        """Count all blocks by state; constant time."""
        free, reserved, held, pinned = self._num_in
        return KvUsage(
            free=free,
            reserved=reserved,
            held=held,
            pinned=pinned,
            total=self.num_blocks,
            cached=len(self._cached),
        )

    def reserve(self, num_blocks: int, prefix: Sequence[bytes] = ()) -> BlockTable | None:
        """Promise `num_blocks` blocks to one owner, or return None and change nothing.

        The longest cached run of `prefix` comes first, shared and held already; name only blocks
        whose KV need not be computed again (a prompt's last token always is, for its logits). The
        rest are reserved: unnamed free blocks, then cached ones, least recently used first.
        """
        shared = self._match(prefix[:num_blocks])
        num_new = num_blocks - len(shared)
        if num_new > self.num_free - sum(block in self._cached for block in shared):
            return None
        self._move(shared, BlockState.FREE, NEXT[BlockState.FREE, BlockEvent.SHARE])
        taken = self._take(num_new)
        states = [BlockState.HELD] * len(shared) + [BlockState.RESERVED] * num_new
        return BlockTable(self, (*shared, *taken), states)

    def _match(self, prefix: Sequence[bytes]) -> list[BlockId]:
        found: list[BlockId] = []
        for name in prefix:
            block = self._name_to_block.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def _take(self, count: int) -> list[BlockId]:
        """Take free blocks, forgetting what they cache."""
        taken = self._unnamed[: -count - 1 : -1]
        evicted = list(itertools.islice(self._cached, count - len(taken)))
        taken += evicted
        self._move(taken, BlockState.FREE, NEXT[BlockState.FREE, BlockEvent.RESERVE])
        for block in evicted:
            del self._name_to_block[self._block_to_name.pop(block)]
        return taken

    def _move(
        self, blocks: Sequence[BlockId], old_state: BlockState, new_state: BlockState
    ) -> None:
        """One table's share in each block goes from `old` to `new`; FREE stands for no share.

        A prompt of a million tokens has 62,500 blocks, and nothing else runs meanwhile: so one
        loop, over plain numbers, does it all.
        """
        old, new, num_in = int(old_state), int(new_state), self._num_in
        for block in blocks:
            owners = self._owners[block]
            before = 3 if owners[3] else 2 if owners[2] else 1 if owners[1] else 0
            if old:
                owners[old] -= 1
            if new:
                owners[new] += 1
            after = 3 if owners[3] else 2 if owners[2] else 1 if owners[1] else 0
            if before == after:
                continue
            num_in[before] -= 1
            num_in[after] += 1
            if before == 0:
                self._leave_free(block)
            elif after == 0:
                self._enter_free(block)

    def _leave_free(self, block: BlockId) -> None:
        if block in self._cached:
            del self._cached[block]
        else:
            is_top = self._unnamed[-1] == block
            check_invariant(is_top, "unnamed blocks leave from the top", block)
            self._unnamed.pop()

    def _enter_free(self, block: BlockId) -> None:
        if block in self._block_to_name:
            self._cached[block] = None
        else:
            self._unnamed.append(block)

    async def _sound_of(self, named: Sequence[tuple[BlockId, bytes]]) -> set[BlockId]:
        """The sound ones of those that are to get a name."""
        if not self._reuse_prefixes:
            return set()
        blocks = [block for block, name in named if self._is_new(block, name)]
        if not blocks:
            return set()
        checked = zip(blocks, await self._are_sound(blocks), strict=True)
        return {block for block, is_sound in checked if is_sound}

    def _is_new(self, block: BlockId, name: bytes) -> bool:
        return block not in self._block_to_name and name not in self._name_to_block

    def _name(self, named: Iterable[tuple[BlockId, bytes]], sound: Container[BlockId]) -> int:
        """Name blocks up to the first that is not sound; returns how many have a name.

        One that a name was found for meanwhile, and lost again, counts as not sound until it is
        looked at the next time.
        """
        if not self._reuse_prefixes:
            return 0
        num_named = 0
        for block, name in named:
            known = self._block_to_name.get(block)
            check_invariant(known in (None, name), "a named block keeps its content", block)
            if self._is_new(block, name):
                if block not in sound:
                    break
                self._name_to_block[name] = block
                self._block_to_name[block] = name
            num_named += 1
        return num_named
