"""One request's life, with decode workers that the test plays in memory."""

import asyncio

import pytest

from pdserve.domain.errors import PdserveError, Reason
from pdserve.domain.tokens import Failed
from router.dispatch import DispatchLimits
from router.in_flight import Outcome
from tests.unit.router.played_cluster import DONE, open_played_cluster, settle


async def reason_of(task: "asyncio.Task[object]") -> Reason:
    with pytest.raises(PdserveError) as caught:
        async with asyncio.timeout(10):
            await task
    return caught.value.reason


async def test_reservation_and_submit_happen_in_one_step() -> None:
    async with open_played_cluster("d0", "d1") as cluster:
        first, second = cluster.start("a"), cluster.start("b")
        await settle()
        # The second choice saw the first reservation.
        assert [len(worker.submits) for worker in cluster.workers.values()] == [1, 1]
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await settle()
        assert cluster.is_idle
        assert cluster.in_flight.counts[Outcome.CANCELLED] == 2


async def test_prompt_counts_as_unread_until_its_first_token() -> None:
    async with open_played_cluster("d0") as cluster:
        worker = cluster.workers["d0"]
        task = cluster.start("a")
        await settle()
        assert cluster.ledger.assigned(worker.hello.worker_id).num_unread_tokens == 3
        worker.say(worker.submits[0], 0, 1)
        await settle()
        assigned = cluster.ledger.assigned(worker.hello.worker_id)
        assert (assigned.num_unread_tokens, assigned.num_requests) == (0, 1)
        worker.say(worker.submits[0], 1, 7, DONE)
        await task
        assert cluster.is_idle


async def test_blocks_are_free_when_the_worker_says_so_though_the_client_reads_nothing() -> None:
    async with open_played_cluster("d0") as cluster:
        worker = cluster.workers["d0"]
        cluster.is_client_reading.clear()
        task = cluster.start("a")
        await settle()
        worker.say(worker.submits[0], 0, 1)
        await settle()
        worker.say(worker.submits[0], 1, 7, DONE)
        await settle()
        assert cluster.ledger.is_empty
        assert not task.done()
        cluster.is_client_reading.set()
        await task
        assert cluster.received["a"] == list(range(8))


async def test_answer_that_is_whole_survives_the_loss_of_its_worker() -> None:
    async with open_played_cluster("d0") as cluster:
        worker = cluster.workers["d0"]
        cluster.is_client_reading.clear()
        task = cluster.start("a")
        await settle()
        worker.say(worker.submits[0], 0, 8, DONE)
        await worker.cut()
        await settle()
        cluster.is_client_reading.set()
        finished = await task
        assert finished.usage.completion_tokens == 8


async def test_buffer_of_a_client_that_does_not_read_is_bounded() -> None:
    async with open_played_cluster(
        "d0", limits=DispatchLimits(max_num_buffered_tokens=4)
    ) as cluster:
        worker = cluster.workers["d0"]
        cluster.is_client_reading.clear()
        task = cluster.start("a", max_tokens=20)
        await settle()
        for index in range(5):  # the first is with the client's connection, four wait
            worker.say(worker.submits[0], index, 1)
            await settle()
        assert not task.done()
        worker.say(worker.submits[0], 5, 1)
        assert await reason_of(task) is Reason.SLOW_CONSUMER
        await settle()
        assert len(worker.cancels) == 1
        assert cluster.is_idle


async def test_fast_worker_is_no_fault_of_a_client_that_reads() -> None:
    async with open_played_cluster(
        "d0", limits=DispatchLimits(max_num_buffered_tokens=16)
    ) as cluster:
        worker = cluster.workers["d0"]
        task = cluster.start("a", max_tokens=1000)
        await settle()
        for index in range(1000):  # all at once
            worker.say(worker.submits[0], index, 1, DONE if index == 999 else None)
        await task
        assert cluster.received["a"] == list(range(1000))


async def test_deadline_ends_the_request_and_cancels_at_the_worker() -> None:
    async with open_played_cluster("d0") as cluster:
        task = cluster.start("a", deadline_s=0.05)
        assert await reason_of(task) is Reason.DEADLINE
        await settle()
        assert len(cluster.workers["d0"].cancels) == 1
        assert cluster.is_idle
        assert cluster.in_flight.counts[Outcome.FAILED] == 1


async def test_deadline_that_has_passed_starts_nothing_that_stays() -> None:
    async with open_played_cluster("d0") as cluster:
        assert await reason_of(cluster.start("a", deadline_s=-1.0)) is Reason.DEADLINE
        await settle()
        assert cluster.is_idle


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (Reason.DRAINING, Reason.WORKER_LOST),
        (Reason.FENCED, Reason.WORKER_LOST),
        (Reason.INCOMPATIBLE_PEER, Reason.WORKER_LOST),
        (Reason.CANCELLED, Reason.WORKER_LOST),
        (Reason.TRANSFER_FAILED, Reason.TRANSFER_FAILED),
    ],
)
async def test_failures_of_workers_are_tried_elsewhere_then_shown(
    told: Reason, shown: Reason
) -> None:
    async with open_played_cluster("d0", "d1") as cluster:
        task = cluster.start("a")
        for worker in cluster.workers.values():
            await settle()
            worker.say(worker.submits[0], 0, 0, Failed(reason=told, message="no"))
        assert await reason_of(task) is shown
        await settle()
        assert cluster.is_idle


@pytest.mark.parametrize(
    "reason",
    [
        Reason.OVERLOADED,
        Reason.QUEUE_TIMEOUT,
        Reason.DEADLINE,
        Reason.SLOW_CONSUMER,
        Reason.KV_INTEGRITY,
        Reason.UNUSABLE_LOGITS,
        Reason.INVALID_FIELD,
        Reason.CONTEXT_TOO_LONG,
        Reason.INTERNAL,
    ],
)
async def test_other_failures_are_not_tried_again(reason: Reason) -> None:
    async with open_played_cluster("d0", "d1") as cluster:
        d0, d1 = cluster.workers.values()
        task = cluster.start("a")
        await settle()
        d0.say(d0.submits[0], 0, 0, Failed(reason=reason, message="no"))
        assert await reason_of(task) is reason
        assert not d1.submits
        await settle()
        assert cluster.is_idle


async def test_drain_ends_what_is_left_after_its_time() -> None:
    async with open_played_cluster("d0") as cluster:
        task = cluster.start("a")
        await settle()
        await cluster.dispatcher.drain(0.01)
        assert await reason_of(task) is Reason.DRAINING
        assert await reason_of(cluster.start("b")) is Reason.DRAINING
        await settle()
        assert cluster.is_idle


async def test_what_has_not_left_the_process_is_taken_back_for_a_new_attempt() -> None:
    async with open_played_cluster("d0", "d1") as cluster:
        d0, d1 = cluster.workers.values()
        task = cluster.start("a", can_take_back=True)
        await settle()
        d0.say(d0.submits[0], 0, 3)
        await settle()
        assert cluster.received["a"] == [0, 1, 2]
        await d0.cut()
        await settle()
        assert cluster.received["a"] == []
        d1.say(d1.submits[0], 0, 8, DONE)
        finished = await task
        assert cluster.received["a"] == list(range(8))
        assert finished.usage.completion_tokens == 8
