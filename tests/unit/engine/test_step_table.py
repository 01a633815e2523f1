"""Blocks stay with a request for as long as a step writes them."""

import asyncio
from collections.abc import Sequence

import pytest

from pdserve.domain.ids import BlockId
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.step_table import StepTable
from tests.support.coroutines import finish


def table_of(pool: BlockPool, num_blocks: int, calls: list[str] | None = None) -> StepTable:
    inner = pool.reserve(num_blocks)
    assert inner is not None
    return StepTable(inner, lambda: calls.append("released") if calls is not None else None)


def test_blocks_released_during_a_step_come_back_after_it() -> None:
    pool, calls = BlockPool(4), list[str]()
    table = table_of(pool, 3, calls)
    table.hold_rest()
    table.enter_step()
    table.release()
    assert pool.usage().held == 3
    assert pool.reserve(2) is None
    assert calls == []
    table.leave_step()
    assert pool.usage().is_idle
    assert calls == ["released"]


def test_blocks_come_back_when_the_last_of_their_users_leaves() -> None:
    pool, calls = BlockPool(4), list[str]()
    table = table_of(pool, 3, calls)
    table.enter_step()
    table.enter_step()
    table.release()
    table.leave_step()
    assert (pool.usage().free, calls) == (1, [])
    table.leave_step()
    assert (pool.usage().free, calls) == (4, ["released"])


def test_release_is_idempotent_in_and_out_of_a_step() -> None:
    pool, calls = BlockPool(4), list[str]()
    table = table_of(pool, 2, calls)
    table.enter_step()
    table.release()
    table.release()
    table.leave_step()
    table.release()
    assert calls == ["released"]


def test_no_step_starts_on_blocks_that_are_given_back() -> None:
    table = table_of(BlockPool(4), 2)
    table.release()
    with pytest.raises(AssertionError):
        table.enter_step()


async def test_blocks_released_while_they_are_looked_at_come_back_after_that() -> None:
    looks = asyncio.Event()

    async def are_sound(block_ids: Sequence[BlockId]) -> list[bool]:
        await looks.wait()
        return [True] * len(block_ids)

    pool = BlockPool(4, are_sound=are_sound)
    table = table_of(pool, 2)
    table.hold_rest()
    publishing = asyncio.create_task(table.publish([b"a", b"b"]))
    await asyncio.sleep(0)
    table.release()
    assert pool.usage().held == 2
    looks.set()
    await publishing
    assert pool.usage().is_idle
    assert pool.usage().cached == 2
    await table.publish([b"a", b"b"])  # nothing is there to be named any more


def test_rest_is_what_is_neither_cached_nor_landed() -> None:
    pool = BlockPool(4)
    first = table_of(pool, 1)
    first.hold_rest()
    finish(first.publish([b"a"]))
    inner = pool.reserve(4, [b"a"])
    assert inner is not None
    table = StepTable(inner, lambda: None)
    assert table.num_cached_blocks == 1
    table.hold(1, 1)
    with pytest.raises(AssertionError):
        table.hold(3, 1)
    table.hold_rest()
    table.hold_rest()
    assert pool.usage().held == 4


def test_blocks_that_are_held_already_may_be_held_again() -> None:
    pool = BlockPool(4)
    table = table_of(pool, 4)
    for end in (2, 2, 1, 3):
        table.hold_until(end)
    assert (pool.usage().held, pool.usage().reserved) == (3, 1)
    table.release()
