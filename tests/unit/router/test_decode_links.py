"""Inboxes: order, gaps, repeats, bounds; links: hellos, loss, reconnection, stalls."""

import asyncio
from random import Random
from typing import Any

import pytest

from pdserve.config.timers import Timers
from pdserve.domain.errors import WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, AttemptId, Epoch, RequestId, WorkerId
from pdserve.domain.messages import PeerHello, RequestOutput, Submit
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.rpc.streams import MAX_NUM_BUFFERED_MESSAGES, MemoryStream, memory_stream_pair
from router.cluster_view import Life
from router.decode_links import DecodeLink, Inbox
from tests.unit.router.played_cluster import DONE, ME, open_played_cluster, settle

ID = RequestId("r")
LIFE = Life(WorkerId("d0"), Epoch(1))


def output(first_index: int, count: int = 1, **fields: Any) -> RequestOutput:
    tokens = tuple(SampledToken(i) for i in range(first_index, first_index + count))
    return RequestOutput(request_id=ID, attempt=1, first_index=first_index, tokens=tokens, **fields)


def make_submit(attempt: int = 1) -> Submit:
    return Submit(
        request_id=ID,
        attempt=attempt,
        prompt_token_ids=(1,),
        sampling=SamplingParams(),
        deadline_s=1.0,
        prefill_targets=(),
    )


def make_inbox(**fields: Any) -> Inbox:
    return Inbox(**{"max_answer_tokens": 100, "max_num_tokens": 100, **fields})


async def test_inbox_gives_all_it_has_as_one_output() -> None:
    inbox = make_inbox()
    inbox.put(output(0, 2, text="ab"))
    inbox.put(output(2, 1, text="c", end=DONE))
    taken = await inbox.take()
    assert [token.token_id for token in taken.tokens] == [0, 1, 2]
    assert (taken.first_index, taken.text, taken.end) == (0, "abc", DONE)
    assert inbox.has_end


async def test_inbox_drops_repeats_and_whatever_follows_the_end() -> None:
    inbox = make_inbox()
    for item in (output(0), output(0), output(1, end=DONE), output(2), output(2, end=DONE)):
        inbox.put(item)
    assert len((await inbox.take()).tokens) == 2


@pytest.mark.parametrize("bad", [output(2), output(1, 100)])
async def test_inbox_ends_with_a_fault_on_a_gap_and_on_too_many(bad: RequestOutput) -> None:
    inbox = make_inbox()
    inbox.put(output(0))
    inbox.put(bad)
    with pytest.raises(WorkerLost):
        await inbox.take()
    assert not inbox.has_end


async def test_inbox_that_overflows_says_so_once_and_keeps_no_more() -> None:
    overflows: list[int] = []
    inbox = make_inbox(max_num_tokens=2, on_overflow=lambda: overflows.append(1))
    for index in range(6):
        inbox.put(output(index))
    assert overflows == [1]
    assert len((await inbox.take()).tokens) == 2


async def test_fault_drops_what_reached_no_client_so_that_a_retry_can_start_afresh() -> None:
    inbox = make_inbox()
    inbox.put(output(0))
    inbox.fail(WorkerLost("gone"))
    with pytest.raises(WorkerLost):
        await inbox.take()


async def test_fault_after_a_whole_answer_changes_nothing() -> None:
    inbox = make_inbox()
    inbox.put(output(0, end=DONE))
    inbox.fail(WorkerLost("gone"))
    assert (await inbox.take()).end is DONE


async def test_loss_fails_every_request_on_the_link_and_the_link_comes_back() -> None:
    async with open_played_cluster("d0") as cluster:
        link = cluster.links["d0"]
        inboxes = [make_inbox(), make_inbox()]
        for attempt, inbox in enumerate(inboxes, 1):
            link.submit(make_submit(attempt), inbox)
        await cluster.workers["d0"].cut()
        for inbox in inboxes:
            with pytest.raises(WorkerLost):
                await inbox.take()
        with pytest.raises(WorkerLost):
            link.submit(make_submit(), make_inbox())
        async with asyncio.timeout(10):
            while not cluster.membership.view(0.0).decode[0].is_usable:
                await settle()
        link.submit(make_submit(), make_inbox())


async def test_leaving_twice_cancels_once() -> None:
    async with open_played_cluster("d0") as cluster:
        link = cluster.links["d0"]
        link.submit(make_submit(), make_inbox())
        link.leave(AttemptId(ID, 1))
        link.leave(AttemptId(ID, 1))
        await settle()
        assert len(cluster.workers["d0"].cancels) == 1


def make_link(connect: Any, changes: list[bool], **timers: float) -> DecodeLink:
    return DecodeLink(
        LIFE,
        "a",
        me=ME,
        connect=connect,
        timers=Timers(**timers),
        rng=Random(0),
        on_change=changes.append,
    )


async def test_worker_that_takes_no_messages_loses_its_link() -> None:
    changes: list[bool] = []
    far_ends: list[MemoryStream[Any, Any]] = []

    async def connect(address: str, timers: Timers) -> MemoryStream[Any, Any]:
        near, far = memory_stream_pair()
        await far.send(hello())
        far_ends.append(far)
        return near

    link = make_link(connect, changes)
    task = asyncio.create_task(link.run())
    await settle()
    assert changes == [True]
    inbox = make_inbox()
    link.submit(make_submit(), inbox)
    for attempt in range(2, MAX_NUM_BUFFERED_MESSAGES):  # nobody reads at the far end
        link.submit(make_submit(attempt), make_inbox())
    with pytest.raises(WorkerLost):
        link.submit(make_submit(MAX_NUM_BUFFERED_MESSAGES), make_inbox())
    for attempt in (2, 3, 4):  # these cancels cannot be sent either
        link.leave(AttemptId(ID, attempt))
        await asyncio.sleep(0)
    assert far_ends[0].is_over
    with pytest.raises(WorkerLost):
        await inbox.take()
    assert changes == [True, False]
    task.cancel()
    await asyncio.wait([task])


def hello(**fields: Any) -> PeerHello:
    known = {
        "peer_id": LIFE.worker_id,
        "epoch": LIFE.epoch,
        "protocol_version": PROTOCOL_VERSION,
    }
    return PeerHello(**{**known, **fields})


@pytest.mark.parametrize(
    "change", [{"peer_id": "d1"}, {"epoch": Epoch(2)}, {"protocol_version": 9}]
)
async def test_another_process_at_the_address_gets_no_requests(change: dict[str, Any]) -> None:
    tries: list[MemoryStream[Any, Any]] = []
    changes: list[bool] = []

    async def connect(address: str, timers: Timers) -> MemoryStream[Any, Any]:
        near, far = memory_stream_pair()
        tries.append(far)
        await far.send(hello(**change))
        return near

    task = asyncio.create_task(make_link(connect, changes).run())
    async with asyncio.timeout(10):
        while len(tries) < 3:
            await settle()
    assert changes == []
    assert await tries[0].receive() == ME
    with pytest.raises(WorkerLost):  # and its stream was closed
        await tries[0].receive()
    task.cancel()
    await asyncio.wait([task])


async def test_worker_that_says_no_hello_is_given_up_in_time() -> None:
    tries: list[MemoryStream[Any, Any]] = []

    async def connect(address: str, timers: Timers) -> MemoryStream[Any, Any]:
        near, far = memory_stream_pair()
        tries.append(far)
        return near

    task = asyncio.create_task(make_link(connect, [], connect_s=0.01).run())
    async with asyncio.timeout(10):
        while len(tries) < 3:
            await settle()
    task.cancel()
    await asyncio.wait([task])
