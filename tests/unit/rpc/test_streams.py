"""Mailboxes and in-memory streams: order, bounds, ends and cancellation."""

import asyncio
from random import Random

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.simulated.virtual_time import Deadlock, run_virtual, virtual
from pdserve.domain.errors import WorkerLost
from pdserve.rpc.streams import (
    MAX_NUM_BUFFERED_MESSAGES,
    Mailbox,
    iterate,
    memory_stream_pair,
    receive_hello,
    send_or_abort,
)


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 4),
    num_putters=st.integers(1, 4),
    num_takers=st.integers(1, 4),
    num_items=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_what_is_put_is_taken_once_whoever_is_cancelled(
    seed: int, size: int, num_putters: int, num_takers: int, num_items: int
) -> None:
    async def run() -> None:
        rng, box = Random(seed), Mailbox[tuple[int, int]](size)
        put: list[tuple[int, int]] = []
        taken: list[tuple[int, int]] = []

        async def put_all(putter: int) -> None:
            for index in range(num_items):
                await asyncio.sleep(rng.choice([0, 0, 0.01]))
                if await box.put((putter, index)):
                    put.append((putter, index))
                assert len(box) <= size

        async def take_all() -> None:
            while (item := await box.take()) is not None:
                taken.append(item)
                await asyncio.sleep(rng.choice([0, 0, 0.01]))

        putters = [asyncio.create_task(put_all(putter)) for putter in range(num_putters)]
        takers = [asyncio.create_task(take_all()) for _ in range(num_takers)]
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(rng.choice([0, 0.01, 0.02]))
            rng.choice([*putters, *takers]).cancel()
        takers.append(asyncio.create_task(take_all()))  # one that nobody cancels
        await asyncio.wait(putters)
        box.end()
        await asyncio.wait(takers)
        assert sorted(taken) == sorted(put)
        assert not await box.put((0, 0))

    run_virtual(run(), seed=seed)


@virtual
async def test_one_taker_gets_the_items_in_order() -> None:
    box = Mailbox[int](2)

    async def put_all() -> None:
        for index in range(20):
            await box.put(index)
        box.end()

    putting = asyncio.create_task(put_all())
    assert [await box.take() for _ in range(21)] == [*range(20), None]
    await putting


@virtual
async def test_what_was_put_before_the_end_can_still_be_taken() -> None:
    box = Mailbox[int](4)
    assert box.try_put(1)
    box.end()
    assert not box.try_put(2)
    assert [await box.take(), await box.take()] == [1, None]


@pytest.mark.parametrize("waits", ["put", "take"])
def test_end_wakes_whoever_waits(waits: str) -> None:
    @virtual
    async def run() -> None:
        box = Mailbox[int](1)
        if waits == "put":
            box.try_put(0)
        tasks = [
            asyncio.create_task(box.put(1)) if waits == "put" else asyncio.create_task(box.take())
            for _ in range(3)
        ]
        await asyncio.sleep(0.1)
        box.end()
        await asyncio.wait(tasks)
        assert {task.result() for task in tasks} <= {False, None}

    run()


@virtual
async def test_turn_of_a_cancelled_taker_goes_to_the_next() -> None:
    box = Mailbox[int](4)
    first, second = (asyncio.create_task(box.take()) for _ in range(2))
    await asyncio.sleep(0.1)
    box.try_put(1)
    first.cancel()
    async with asyncio.timeout(1):
        assert await second == 1


@pytest.mark.parametrize("how", ["close", "abort"])
def test_end_of_one_side_is_the_end_of_both(how: str) -> None:
    @virtual
    async def run() -> None:
        left, right = memory_stream_pair("left", "right")
        await left.send("last words")
        if how == "close":
            await left.close()
        else:
            left.abort()
        assert [message async for message in iterate(right)] == ["last words"]
        for end in (left, right):
            assert not end.try_send("more")
            with pytest.raises(WorkerLost):
                await end.send("more")
            with pytest.raises(WorkerLost):
                await end.receive()

    run()


@virtual
async def test_message_that_cannot_be_sent_ends_the_stream_at_both_ends_once() -> None:
    left, right = memory_stream_pair("left", "right")
    for index in range(MAX_NUM_BUFFERED_MESSAGES):
        assert send_or_abort(left, index)
    assert not left.is_over
    with structlog.testing.capture_logs() as logs:
        assert not send_or_abort(left, "one too many")
        assert not send_or_abort(left, "nor this")
    assert [(log["event"], log["unsent"]) for log in logs] == [("stream.aborted", "str")]
    assert left.is_over
    with pytest.raises(WorkerLost):
        await left.receive()
    assert len([message async for message in iterate(right)]) == MAX_NUM_BUFFERED_MESSAGES


@virtual
async def test_cancelled_receiver_leaves_the_stream_intact() -> None:
    left, right = memory_stream_pair()
    receiving = asyncio.create_task(right.receive())
    await asyncio.sleep(0.1)
    receiving.cancel()
    await asyncio.wait([receiving])
    await left.send(1)
    assert await right.receive() == 1


@virtual
async def test_hello_is_waited_for_only_so_long() -> None:
    left, right = memory_stream_pair("left", "right")
    left.try_send("hello")
    assert await receive_hello(right, 1.0) == "hello"
    with pytest.raises(WorkerLost, match="left said nothing for 1 s"):
        await receive_hello(right, 1.0)


def test_virtual_time_names_a_deadlock() -> None:
    async def wait_for_ever() -> None:
        await Mailbox[int]().take()

    with pytest.raises(Deadlock, match=r"wait_for_ever"):
        run_virtual(wait_for_ever())
