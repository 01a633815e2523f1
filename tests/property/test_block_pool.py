"""The block pool against a naive model that recounts everything."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from pdserve.engine.block_pool import BlockPool, BlockTable
from tests.support.coroutines import finish

NUM_BLOCKS = 8
CHAINS = [[bytes([chain, index]) for index in range(5)] for chain in range(3)]
STRENGTH = ["free", "reserved", "held", "pinned"]


@dataclass
class Owned:
    """What the model knows of one table."""

    table: BlockTable
    blocks: list[int]
    chain: int
    states: list[str] = field(default_factory=list)


class PoolMachine(RuleBasedStateMachine):
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.owned: list[Owned] = []
        self.contents: dict[int, bytes] = {}  # named blocks, free or not
        self.freed: list[int] = []  # cached free blocks, oldest first

    def state_of(self, block: int) -> str:
        states = [
            state
            for owned in self.owned
            for other, state in zip(owned.blocks, owned.states, strict=True)
            if other == block
        ]
        return max(states, key=STRENGTH.index, default="free")

    def free_blocks(self) -> set[int]:
        return {block for block in range(NUM_BLOCKS) if self.state_of(block) == "free"}

    @rule(target=tables, size=st.integers(0, 6), chain=st.sampled_from(range(3)))
    def reserve(self, size: int, chain: int) -> object:
        name_to_block = {name: block for block, name in self.contents.items()}
        matched = []
        for name in CHAINS[chain][:size]:
            if name not in name_to_block:
                break
            matched.append(name_to_block[name])
        free = self.free_blocks()
        has_room = size - len(matched) <= len(free - set(matched))
        before = self.pool.usage()

        table = self.pool.reserve(size, CHAINS[chain])

        assert (table is not None) == has_room
        if table is None:
            assert self.pool.usage() == before
            return multiple()
        assert table.num_cached_blocks == len(matched)
        assert list(table.block_ids[: len(matched)]) == matched
        taken = [int(block) for block in table.block_ids[len(matched) :]]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= free - set(matched)
        self.freed = [block for block in self.freed if block not in matched]
        num_evicted = max(0, len(taken) - len(free - set(matched) - set(self.freed)))
        evicted = self.freed[:num_evicted]
        assert [block for block in taken if block in self.contents] == evicted
        for block in evicted:
            del self.contents[block]
        self.freed = self.freed[num_evicted:]
        states = ["held"] * len(matched) + ["reserved"] * len(taken)
        owned = Owned(table, matched + taken, chain, states)
        self.owned.append(owned)
        return owned

    def change(self, owned: Owned, event: str, old: str, new: str, span: tuple[int, int]) -> None:
        first, count = span
        places = range(first, first + count)
        if all(place < len(owned.blocks) and owned.states[place] == old for place in places):
            getattr(owned.table, event)(first, count)
            for place in places:
                owned.states[place] = new
        else:
            before = self.pool.usage()
            with pytest.raises(AssertionError):
                getattr(owned.table, event)(first, count)
            assert self.pool.usage() == before

    spans = st.tuples(st.integers(0, 5), st.integers(0, 4))

    @rule(owned=tables, span=spans)
    def hold(self, owned: Owned, span: tuple[int, int]) -> None:
        self.change(owned, "hold", "reserved", "held", span)

    @rule(owned=tables)
    def hold_all_reserved(self, owned: Owned) -> None:
        first = owned.table.num_cached_blocks
        self.change(owned, "hold", "reserved", "held", (first, len(owned.blocks) - first))

    @rule(owned=tables, span=spans)
    def pin(self, owned: Owned, span: tuple[int, int]) -> None:
        self.change(owned, "pin", "held", "pinned", span)

    @rule(owned=tables, span=spans)
    def unpin(self, owned: Owned, span: tuple[int, int]) -> None:
        self.change(owned, "unpin", "pinned", "held", span)

    @rule(owned=tables, count=st.integers(1, 5))
    def publish(self, owned: Owned, count: int) -> None:
        count = min(count, len(owned.blocks))
        if "reserved" in owned.states[:count]:
            with pytest.raises(AssertionError):
                finish(owned.table.publish(CHAINS[owned.chain][:count]))
            return
        finish(owned.table.publish(CHAINS[owned.chain][:count]))
        for block, name in zip(owned.blocks, CHAINS[owned.chain][:count], strict=False):
            if block not in self.contents and name not in self.contents.values():
                self.contents[block] = name

    @rule(owned=consumes(tables))
    def release(self, owned: Owned) -> None:
        owned.table.release()
        owned.table.release()
        self.owned.remove(owned)
        for block in reversed(owned.blocks):
            if self.state_of(block) == "free" and block in self.contents:
                self.freed.append(block)
        assert owned.table.block_ids == ()

    @invariant()
    def counts_agree(self) -> None:
        usage = self.pool.usage()
        states = [self.state_of(block) for block in range(NUM_BLOCKS)]
        assert [usage.free, usage.reserved, usage.held, usage.pinned] == [
            states.count(state) for state in STRENGTH
        ]
        assert usage.cached == len(self.freed)
        assert usage.total == NUM_BLOCKS == self.pool.num_blocks
        assert self.pool.num_free == usage.free

    def teardown(self) -> None:
        for owned in self.owned:
            owned.table.release()
        assert self.pool.usage().is_idle


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockPool = PoolMachine.TestCase
