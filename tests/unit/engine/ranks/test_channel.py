"""Two ends of a channel on one event loop: questions, failures, silence, ends."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import NoReturn

import pytest

from pdserve.domain.errors import LocalFault, RankLost, TransferFailed
from pdserve.engine.ranks.channel import GIVE_UP_S, RankChannel
from pdserve.engine.ranks.frames import Message

DEADLINE_S = 20.0


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[RankChannel, RankChannel]]:
    first, second = socket.socketpair()
    one = await RankChannel.open(first, "rank 1")
    other = await RankChannel.open(second, "rank 0")
    try:
        yield one, other
    finally:
        await one.close()
        await other.close()


async def echo(message: Message) -> Message:
    return message


async def forever(_: Message) -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def test_questions_go_both_ways_with_fields_and_bytes() -> None:
    async with pair() as (one, other):
        one.handle("echo", echo)
        other.handle("echo", echo)
        for channel in (one, other):
            sent = Message({"rank": 3, "names": ["a", "ä"]}, bytes(range(256)) * 300)
            got = await channel.ask("echo", sent, deadline_s=DEADLINE_S)
            assert (got.fields, got.body) == (sent.fields, sent.body)


async def test_handlers_begin_in_the_order_of_the_questions() -> None:
    begun: list[int] = []

    async def note(message: Message) -> None:
        begun.append(message.fields["number"])
        await asyncio.sleep(0)

    async with pair() as (one, other):
        other.handle("note", note)
        answers = [one.begin("note", Message({"number": number})) for number in range(50)]
        await asyncio.wait_for(asyncio.gather(*answers), DEADLINE_S)
    assert begun == list(range(50))


@pytest.mark.parametrize("fault", [LocalFault("no"), TransferFailed("late"), RankLost("gone")])
async def test_errors_of_ours_are_raised_where_the_question_was_asked(fault: Exception) -> None:
    async def fail(_: Message) -> NoReturn:
        raise fault

    async with pair() as (one, other):
        other.handle("fail", fail)
        with pytest.raises(type(fault), match=str(fault)):
            await one.ask("fail", deadline_s=DEADLINE_S)


async def test_text_of_a_foreign_error_stays_where_it_was_raised() -> None:
    async def fail(_: Message) -> NoReturn:
        raise ValueError("a secret")

    async with pair() as (one, other):
        other.handle("fail", fail)
        with pytest.raises(LocalFault, match="fail failed: ValueError") as caught:
            await one.ask("fail", deadline_s=DEADLINE_S)
        assert "secret" not in caught.value.message
        with pytest.raises(LocalFault, match="nobody here answers unknown"):
            await one.ask("unknown", deadline_s=DEADLINE_S)


async def test_late_answer_raises_and_cancels_the_handler() -> None:
    async with pair() as (one, other):
        other.handle("forever", forever)
        with pytest.raises(RankLost, match=r"rank 1 did not answer forever within 0.05 s"):
            await one.ask("forever", deadline_s=0.05)


async def test_question_cancelled_before_its_handler_began_is_over_at_once() -> None:
    async with pair() as (one, other):
        other.handle("forever", forever)
        asking = asyncio.create_task(one.ask("forever", deadline_s=DEADLINE_S))
        await asyncio.sleep(0)
        asking.cancel()
        async with asyncio.timeout(GIVE_UP_S / 2):
            await asyncio.wait([asking])
        assert asking.cancelled()


async def test_cancelled_question_is_over_at_the_peer_when_it_raises() -> None:
    has_begun, is_over = asyncio.Event(), False

    async def work(_: Message) -> None:
        nonlocal is_over
        has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)
            is_over = True

    async with pair() as (one, other):
        other.handle("work", work)
        asking = asyncio.create_task(one.ask("work", deadline_s=DEADLINE_S))
        await has_begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert is_over


async def test_end_of_the_peer_fails_what_is_open_and_is_told_once() -> None:
    told: list[str] = []
    async with pair() as (one, other):
        one.on_lost = told.append
        other.handle("forever", forever)
        answer = one.begin("forever")
        await asyncio.sleep(0)
        await other.close()
        with pytest.raises(RankLost):
            await asyncio.wait_for(answer, DEADLINE_S)
        await one.over.wait()
        with pytest.raises(RankLost, match="rank 1 is lost"):
            await one.ask("forever", deadline_s=DEADLINE_S)
    assert told == ["closed its connection"]


async def test_peer_that_beats_is_not_lost_and_one_that_is_silent_is() -> None:
    told: list[str] = []
    async with pair() as (one, other):
        one.on_lost = told.append
        one.max_silence_s = 1.0
        for _ in range(15):  # beats come every quarter of a second
            await asyncio.sleep(0.1)
        assert told == []
        other._tasks[1].cancel()  # as if the peer were stopped: it beats no more
        await asyncio.wait_for(one.over.wait(), DEADLINE_S)
    assert len(told) == 1
    assert told[0].startswith("has been silent for 1")


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(8) + b"x", b"\x02\0\0\0\0\0\0\0[]"]
)
async def test_peer_that_sends_no_frames_is_lost(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = await RankChannel.open(ours, "10.0.0.9")
        theirs.sendall(garbage + b"\xff" * 64)
        await asyncio.wait_for(channel.over.wait(), DEADLINE_S)
        await channel.close()
