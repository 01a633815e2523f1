"""What the router knows of one request, and what it counts of it."""

import asyncio
from typing import Any

import pytest

from deploy.simulated.virtual_time import virtual
from pdserve.config.processes import SloClass
from pdserve.domain.errors import PdserveError, Reason
from pdserve.domain.ids import Epoch, RequestId, WorkerId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Finished, FinishReason, PhaseTimeline, Usage
from router.cluster_view import Life, RequestShape
from router.in_flight import Outcome
from router.records import Record, Visit
from router.requests import Chunk
from router.slo import SloResult

CANCELLED = PdserveError("the client is gone", reason=Reason.CANCELLED)
LATE = PdserveError("too late", reason=Reason.DEADLINE)


async def send(chunk: Chunk) -> None:
    return


def record(patience: asyncio.Timeout | None = None, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "request_id": RequestId("a.1"),
        "label": "a",
        "received_s": 10.0,
        "deadline_s": 20.0,
        "send": send,
        "take_back": None,
        "patience": patience or asyncio.Timeout(None),
        **changes,
    }
    return Record(**fields)


@virtual
async def test_first_verdict_stands_and_ends_the_wait() -> None:
    loop = asyncio.get_running_loop()
    patience = asyncio.timeout(1e6)
    stopped = record(patience)
    loop.call_later(1.0, stopped.stop, CANCELLED)
    loop.call_later(1.0, stopped.stop, LATE)
    started_s = loop.time()
    await wait_under(patience)
    assert loop.time() - started_s == pytest.approx(1.0)
    assert stopped.verdict is CANCELLED


@virtual
async def test_verdict_after_the_deadline_changes_nothing() -> None:
    patience = asyncio.timeout(1.0)
    late = record(patience)
    await wait_under(patience)
    late.stop(CANCELLED)
    assert late.verdict is None


async def wait_under(patience: asyncio.Timeout) -> None:
    """Until its time is over."""
    with pytest.raises(TimeoutError):
        async with patience:
            await asyncio.Event().wait()


def test_times_are_told_from_the_token_on_that_makes_them() -> None:
    one = record()
    assert (one.ttft_s, one.tpot_s) == (None, None)
    one.first_token_s = one.last_token_s = 10.5
    one.num_delivered = 1
    assert (one.ttft_s, one.tpot_s) == (0.5, None), "one token has no gap"
    one.last_token_s, one.num_delivered = 11.5, 5
    assert one.tpot_s == 0.25


def test_an_answer_that_can_be_taken_back_starts_from_nothing() -> None:
    taken: list[str] = []
    life = Life(WorkerId("d0"), Epoch(1))
    one = record(
        take_back=lambda: taken.append("back"),
        num_delivered=3,
        first_token_s=11.0,
        submitted_s=10.2,
        failed_lives={life},
    )
    one.start_again()
    assert taken == ["back"]
    assert (one.num_delivered, one.first_token_s, one.ttft_s) == (0, None, None)
    assert one.failed_lives == {life}, "who failed stays left out"


def test_an_answer_that_has_left_the_process_is_interrupted() -> None:
    record().start_again()  # nothing was sent yet
    with pytest.raises(PdserveError, match="after 2 tokens") as caught:
        record(num_delivered=2, first_token_s=11.0).start_again()
    assert caught.value.reason is Reason.STREAM_INTERRUPTED


def test_shape_is_of_the_prompt_and_the_longest_answer() -> None:
    shaped = record(token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=7))
    assert shaped.shape == RequestShape(num_prompt_tokens=3, max_tokens=7)


def test_a_finished_visit_counts_its_tokens_and_times() -> None:
    usage = Usage(prompt_tokens=5, completion_tokens=3, cached_prompt_tokens=2, seed=1)
    visit = Visit(
        received_s=10.0,
        promise=SloClass(name="chat", ttft_s=1.0, tpot_s=0.1),
        outcome=Outcome.COMPLETED,
        reason="length",
        record=record(submitted_s=10.25, first_token_s=10.5, last_token_s=11.5, num_delivered=3),
        finished=Finished(reason=FinishReason.LENGTH, usage=usage, timeline=PhaseTimeline()),
    )
    seen = visit.seen(12.0)
    assert (seen.total_s, seen.ttft_s, seen.tpot_s) == (2.0, 0.5, 0.5)
    end = visit.end(SloResult.MISSED_TPOT, seen)
    assert (end.outcome, end.reason) == ("completed", "length")
    assert (end.slo_class, end.slo_result) == ("chat", "missed_tpot")
    assert (end.total_s, end.queue_s, end.ttft_s, end.tpot_s) == (2.0, 0.25, 0.5, 0.5)
    tokens = (end.num_prompt_tokens, end.num_cached_tokens, end.num_output_tokens)
    assert tokens == (5, 2, 3)


def test_a_visit_that_was_never_submitted_waited_in_no_queue_and_has_no_tokens() -> None:
    for visit in (Visit(received_s=10.0), Visit(received_s=10.0, record=record())):
        end = visit.end(None, visit.seen(10.5))
        assert (end.outcome, end.slo_class, end.slo_result) == ("failed", "", "")
        assert (end.total_s, end.queue_s, end.ttft_s, end.tpot_s) == (0.5, None, None, None)
        assert (end.num_prompt_tokens, end.num_cached_tokens, end.num_output_tokens) == (0, 0, 0)


def test_a_failed_visit_counts_what_its_client_got() -> None:
    part = record(submitted_s=10.5, first_token_s=11.0, last_token_s=11.5, num_delivered=2)
    visit = Visit(received_s=10.0, reason="WORKER_LOST", record=part)
    end = visit.end(SloResult.FAILED, visit.seen(12.0))
    assert (end.num_output_tokens, end.num_prompt_tokens) == (2, 0)
    assert (end.ttft_s, end.tpot_s, end.queue_s) == (1.0, 0.5, 0.5)
