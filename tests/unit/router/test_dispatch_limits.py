"""The limits of a plan at the dispatcher, and what it tells those who count."""

import asyncio

import pytest

from pdserve.domain.errors import BadRequest, PdserveError, Reason, Refused
from router.dispatch import DispatchLimits
from router.in_flight import Outcome
from router.rate_limit import RateLimit
from tests.unit.router.played_cluster import DONE, PlayedCluster, open_played_cluster, settle


async def refusal_of(task: "asyncio.Task[object]") -> Refused:
    with pytest.raises(Refused) as caught:
        async with asyncio.timeout(10):
            await task
    assert caught.value.reason is Reason.OVERLOADED
    return caught.value


async def cancel(*tasks: "asyncio.Task[object]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()


async def test_request_beyond_max_num_waiting_is_refused_until_a_first_token_comes() -> None:
    async with open_played_cluster("d0", limits=DispatchLimits(max_num_waiting=2)) as cluster:
        worker = cluster.workers["d0"]
        first, second = cluster.start("a"), cluster.start("b")
        await settle()
        refused = await refusal_of(cluster.start("c"))
        assert "2 requests wait for their first token; the limit is 2" in refused.message
        assert refused.retry_after_s > 0
        worker.say(worker.submits[0], 0, 1)  # "a" waits no more, though it goes on
        await settle()
        third = cluster.start("d")
        await settle()
        assert len(worker.submits) == 3
        await cancel(first, second, third)
        assert cluster.is_idle


async def test_request_that_would_wait_longer_than_max_wait_is_refused() -> None:
    # Three prompt tokens ahead take one step: 10 ms and 1 ms each.
    async with open_played_cluster("d0", limits=DispatchLimits(max_wait_s=0.015)) as cluster:
        first = cluster.start("a")
        await settle()
        second = cluster.start("b")  # would wait 13 ms
        await settle()
        assert len(cluster.workers["d0"].submits) == 2
        refused = await refusal_of(cluster.start("c"))  # would wait 16 ms
        assert "longer than 0.015 s" in refused.message
        await cancel(first, second)


async def test_request_beyond_the_rate_is_refused_until_its_time_has_come() -> None:
    limits = DispatchLimits(rate=RateLimit(10.0, 2))
    async with open_played_cluster("d0", limits=limits) as cluster:
        worker = cluster.workers["d0"]
        tasks = [cluster.start("a"), cluster.start("b")]
        await settle()
        refused = await refusal_of(cluster.start("c"))
        assert "faster than the limit of 10 a second" in refused.message
        assert 0 < refused.retry_after_s <= 0.1
        assert cluster.watch.ends[-1].outcome == "refused"
        assert cluster.watch.ends[-1].reason == "OVERLOADED"
        await asyncio.sleep(refused.retry_after_s)
        tasks.append(cluster.start("d"))
        await settle()
        assert len(worker.submits) == 3
        await cancel(*tasks)
        assert cluster.is_idle


async def test_request_that_another_limit_refuses_does_not_count_for_the_rate() -> None:
    limits = DispatchLimits(max_num_waiting=1, rate=RateLimit(1e-3, 2))
    async with open_played_cluster("d0", limits=limits) as cluster:
        worker = cluster.workers["d0"]
        first = cluster.start("a")
        await settle()
        for number in range(5):
            await refusal_of(cluster.start(f"r{number}"))
        worker.say(worker.submits[0], 0, 8, DONE)
        await first
        second = cluster.start("b")
        await settle()
        assert len(worker.submits) == 2
        await cancel(second)


async def test_request_whose_worker_is_lost_is_counted_once_for_the_rate() -> None:
    limits = DispatchLimits(rate=RateLimit(1e-3, 1))
    async with open_played_cluster("d0", "d1", limits=limits) as cluster:
        first = cluster.start("a")
        await settle()
        lost, other = sorted(cluster.workers.values(), key=lambda worker: -len(worker.submits))
        await lost.cut()
        await settle()
        other.say(other.submits[0], 0, 8, DONE)
        await first


@pytest.mark.parametrize("off", [None, 0])
async def test_no_limit_and_0_refuse_nobody(off: int | None) -> None:
    limits = DispatchLimits(max_num_waiting=off, max_wait_s=off)
    async with open_played_cluster("d0", limits=limits) as cluster:
        tasks = [cluster.start(f"r{index}") for index in range(20)]
        await settle()
        assert len(cluster.workers["d0"].submits) == 20
        await cancel(*tasks)


async def test_request_whose_worker_is_lost_is_not_refused_by_limits_for_new_ones() -> None:
    limits = DispatchLimits(max_num_waiting=1, max_wait_s=0.001)
    async with open_played_cluster("d0", "d1", limits=limits) as cluster:
        first = cluster.start("a")
        await settle()
        lost, other = sorted(cluster.workers.values(), key=lambda worker: -len(worker.submits))
        await refusal_of(cluster.start("b"))
        await lost.cut()
        await settle()
        assert len(other.submits) == 1  # moved, with the limit at 1 all the while
        other.say(other.submits[0], 0, 8, DONE)
        await first
        assert cluster.watch.failed_attempts == ["WORKER_LOST"]


async def run_one(
    cluster: PlayedCluster, label: str, *, tokens: int = 8, slo_class: str = ""
) -> None:
    worker = cluster.workers["d0"]
    task = cluster.start(label, max_tokens=tokens, slo_class=slo_class)
    await settle()
    submit = worker.submits[-1]
    worker.say(submit, 0, 1)
    await settle()
    worker.say(submit, 1, tokens - 1, DONE)
    await task


async def test_every_end_is_told_once_with_what_its_client_got() -> None:
    async with open_played_cluster("d0", limits=DispatchLimits(max_num_waiting=1)) as cluster:
        await run_one(cluster, "a")
        waiting = cluster.start("b")
        await settle()
        await refusal_of(cluster.start("c"))
        with pytest.raises(PdserveError):
            await cluster.start("b")  # the name is taken
        await cancel(waiting)
        ends = cluster.watch.ends
        assert [(end.outcome, end.reason) for end in ends] == [
            ("completed", "length"),
            ("refused", "OVERLOADED"),
            ("refused", "DUPLICATE_ID"),
            ("cancelled", "CANCELLED"),
        ]
        done = ends[0]
        assert (done.num_prompt_tokens, done.num_output_tokens) == (3, 8)
        assert done.ttft_s is not None
        assert done.tpot_s is not None
        assert 0 <= done.ttft_s <= done.total_s
        assert [end.ttft_s for end in ends[1:]] == [None] * 3
        assert [end.queue_s is None for end in ends] == [False, True, True, False]


async def test_requests_are_judged_by_the_class_they_name() -> None:
    async with open_played_cluster("d0", limits=DispatchLimits(max_num_waiting=1)) as cluster:
        await run_one(cluster, "a")
        await run_one(cluster, "b", slo_class="fast")
        waiting = cluster.start("c")
        await settle()
        await refusal_of(cluster.start("d"))
        with pytest.raises(BadRequest, match="known: fast"):
            await cluster.start("e", slo_class="slow")
        await cancel(waiting)
        (fast,) = cluster.slo.states()
        assert (fast.num_met, fast.num_refused, fast.num_judged) == (2, 1, 3)
        assert [end.slo_result for end in cluster.watch.ends] == ["met", "met", "refused", "", ""]
        assert cluster.watch.ends[3].slo_class == ""
        # "e" was wrong before it was in the table.
        assert cluster.in_flight.counts[Outcome.REFUSED] == 1


async def test_tpot_is_the_mean_gap_of_the_tokens_after_the_first() -> None:
    async with open_played_cluster("d0") as cluster:
        worker = cluster.workers["d0"]
        task = cluster.start("a", max_tokens=5)
        await settle()
        worker.say(worker.submits[0], 0, 1)
        await asyncio.sleep(0.2)
        worker.say(worker.submits[0], 1, 4, DONE)
        await task
        (end,) = cluster.watch.ends
        assert end.tpot_s == pytest.approx(0.2 / 4, rel=0.3)
        (fast,) = cluster.slo.states()
        assert fast.num_met == 1
