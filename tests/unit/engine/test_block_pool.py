import asyncio
from collections.abc import Sequence

from pdserve.domain.ids import BlockId
from pdserve.engine.block_pool import NEXT, BlockEvent, BlockPool, BlockState
from tests.support.coroutines import finish

NAMES = [bytes([index]) * 16 for index in range(6)]


def publish(pool: BlockPool, num_blocks: int) -> tuple[int, ...]:
    """Fill and name blocks, give them back, and say which they were."""
    table = pool.reserve(num_blocks)
    assert table is not None
    table.hold(0, num_blocks)
    finish(table.publish(NAMES[:num_blocks]))
    block_ids = table.block_ids
    table.release()
    return block_ids


def count_cached(pool: BlockPool) -> int:
    """How many leading names a reservation finds computed: as many blocks are held at once."""
    for count in range(1, len(NAMES) + 1):
        table = pool.reserve(count, NAMES)
        num_held = pool.usage().held
        if table is not None:
            table.release()
        if num_held < count:
            return count - 1
    return len(NAMES)


def test_eviction_shortens_a_prefix_from_its_end() -> None:
    pool = BlockPool(6)
    publish(pool, 6)
    assert pool.usage().cached == 6
    taken = pool.reserve(2)
    assert taken is not None
    assert count_cached(pool) == 4
    taken.release()
    assert count_cached(pool) == 4


def test_shared_block_is_free_only_when_the_last_owner_leaves() -> None:
    pool = BlockPool(6)
    block_ids = publish(pool, 2)
    first, second = pool.reserve(3, NAMES), pool.reserve(2, NAMES)
    assert first is not None
    assert second is not None
    assert first.block_ids[:2] == second.block_ids == block_ids
    second.pin(0, 1)
    assert (pool.usage().pinned, pool.usage().held, pool.usage().reserved) == (1, 1, 1)
    second.release()
    assert (pool.usage().pinned, pool.usage().held, pool.usage().reserved) == (0, 2, 1)
    first.release()
    assert pool.usage().is_idle


def test_too_few_blocks_change_nothing() -> None:
    pool = BlockPool(4)
    publish(pool, 3)
    before = pool.usage()
    assert pool.reserve(5, NAMES) is None
    assert pool.usage() == before
    assert count_cached(pool) == 3


def test_without_reuse_nothing_is_found() -> None:
    pool = BlockPool(4, reuse_prefixes=False)
    publish(pool, 3)
    assert pool.usage().cached == 0
    assert count_cached(pool) == 0


def test_every_state_but_free_can_be_released() -> None:
    for state in BlockState:
        can_release = (state, BlockEvent.RELEASE) in NEXT
        assert can_release == (state is not BlockState.FREE)


def test_block_that_is_not_sound_gets_no_name_nor_do_those_after_it() -> None:
    async def are_sound(blocks: Sequence[BlockId]) -> list[bool]:
        return [block != 2 for block in blocks]

    pool = BlockPool(8, are_sound=are_sound)
    publish(pool, 5)
    assert count_cached(pool) == 2
    assert pool.usage().cached == 2
    assert pool.usage().is_idle


async def test_block_whose_name_was_another_s_while_it_was_looked_at_is_looked_at_again() -> None:
    """The other block is evicted meanwhile, and this one has not been looked at."""
    looks = asyncio.Event()
    seen: list[BlockId] = []

    async def are_sound(block_ids: Sequence[BlockId]) -> list[bool]:
        seen.extend(block_ids)
        await looks.wait()
        return [True] * len(block_ids)

    pool = BlockPool(3, are_sound=are_sound)
    looks.set()
    first = pool.reserve(1)
    assert first is not None
    first.hold(0, 1)
    await first.publish(NAMES[:1])
    first.release()
    looks.clear()
    second = pool.reserve(2)
    assert second is not None
    second.hold(0, 2)
    publishing = asyncio.create_task(second.publish(NAMES[:2]))
    await asyncio.sleep(0)
    evicting = pool.reserve(1)
    assert evicting is not None
    looks.set()
    await publishing
    assert pool.reserve(1, NAMES) is None, "it shares nothing, and nothing is free"
    await second.publish(NAMES[:2])
    assert [seen.count(block) for block in second.block_ids] == [1, 2]
    second.release()
    evicting.release()
    assert count_cached(pool) == 2
