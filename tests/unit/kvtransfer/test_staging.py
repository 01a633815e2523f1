import asyncio
import contextlib

from kvtransfer.staging import Staging
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import layout_of

SMALL, LARGE = layout_of(64), layout_of(4096)


def is_closed(memory: KvMemory) -> bool:
    return memory.fd is None


async def test_memory_holds_as_many_blocks_as_fit_and_at_least_one() -> None:
    staging = Staging(slot_bytes=1024, num_slots=2)
    async with staging.lend(SMALL) as small, staging.lend(LARGE) as large:
        assert (small.layout, small.num_blocks) == (SMALL, 16)
        assert (large.layout, large.num_blocks) == (LARGE, 1)
    staging.close()


async def test_memory_holds_the_blocks_that_are_asked_for_whatever_fits() -> None:
    staging = Staging(slot_bytes=1024, num_slots=2)
    async with staging.lend(LARGE) as small:
        pass
    async with staging.lend(LARGE, 3) as large:
        assert large is not small
        assert large.num_blocks == 3
    async with staging.lend(LARGE, 2) as again:
        assert again is large
    staging.close()


async def test_memory_of_a_layout_is_used_again_and_that_of_others_makes_room() -> None:
    staging = Staging(slot_bytes=1024, num_slots=2)
    seen: list[KvMemory] = []
    for layout in (SMALL, LARGE, SMALL, layout_of(128), SMALL, LARGE):
        async with staging.lend(layout) as memory:
            seen.append(memory)
    first, other = seen[0], seen[1]
    assert seen[2] is seen[4] is first
    assert is_closed(other), "the memory that was longest out of use makes room"
    assert seen[5] is not other
    assert not is_closed(first)
    assert staging.num_bytes == 1024 + 4096
    staging.close()
    assert is_closed(first)
    assert staging.num_bytes == 0
    staging.close()


async def test_who_comes_when_all_is_lent_waits_for_the_next_that_is_given_back() -> None:
    staging = Staging(slot_bytes=1024, num_slots=1)
    came = asyncio.Event()

    async def come() -> None:
        async with staging.lend(LARGE):
            came.set()

    with contextlib.suppress(ZeroDivisionError):
        async with staging.lend(SMALL):
            waiting = asyncio.create_task(come())
            for _ in range(5):
                await asyncio.sleep(0)
            assert not came.is_set()
            raise ZeroDivisionError
    await waiting
    assert staging.num_bytes == 4096
    staging.close()
