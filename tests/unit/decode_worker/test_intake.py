"""Who waits for blocks, who gets them, and that giving up gives them back."""

import asyncio
from typing import Any

import pytest

from decode_worker.intake import Intake
from decode_worker.requests import DecodeRequest
from decode_worker.stream import Answer, RouterOutbox
from deploy.simulated.virtual_time import virtual
from pdserve.domain.errors import BadRequest, Reason, Refused
from pdserve.domain.ids import RequestId
from pdserve.domain.messages import Submit
from pdserve.domain.prefix import hash_full_blocks
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.waiting import DISCIPLINES, QueueOrder
from pdserve.engine.block_pool import BlockPool
from pdserve.rpc.streams import memory_stream_pair
from tests.support.worker_pair import BLOCK_SIZE, demo_tokenizer


def request_of(num_blocks: int, first: int = 3, deadline_s: float = 60.0) -> DecodeRequest:
    """A request that needs this many blocks; its prompt has all but the last position."""
    sampling = SamplingParams(max_tokens=1)
    prompt = tuple(range(first, first + num_blocks * BLOCK_SIZE))
    return DecodeRequest(
        Submit(
            request_id=RequestId(str(first)),
            attempt=1,
            prompt_token_ids=prompt,
            sampling=sampling,
            deadline_s=deadline_s,
            prefill_targets=(),
        ),
        answer=Answer(sampling, eos_token_ids=(), detokenizer=demo_tokenizer().detokenizer()),
        outbox=RouterOutbox(memory_stream_pair()[0]),
        names=hash_full_blocks(prompt, BLOCK_SIZE),
        clock=asyncio.get_running_loop().time,
    )


def intake_of(
    num_blocks: int, order: QueueOrder = "fcfs", **changes: Any
) -> tuple[Intake, BlockPool]:
    pool = BlockPool(num_blocks)
    fields = {"max_num_requests": 8, "max_num_queued": 8, "queue_s": 10.0, **changes}
    clock = asyncio.get_running_loop().time
    discipline = DISCIPLINES[order]
    return Intake(pool, block_size=BLOCK_SIZE, discipline=discipline, clock=clock, **fields), pool


@virtual
async def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    intake, pool = intake_of(4)
    held, large, small = request_of(3), request_of(4), request_of(1)
    await intake.admit(held)
    waiting = [asyncio.create_task(intake.admit(each)) for each in (large, small)]
    await asyncio.sleep(1)
    assert intake.num_waiting == 2
    assert intake.num_waiting_prompt_tokens == 5 * BLOCK_SIZE
    intake.leave(held)
    await waiting[0]
    assert not waiting[1].done()
    intake.leave(large)
    await waiting[1]
    intake.leave(small)
    assert pool.usage().is_idle
    assert intake.num_admitted == 0


@virtual
async def test_by_deadline_who_leaves_first_is_next_and_passes_who_does_not_fit() -> None:
    intake, pool = intake_of(4, "deadline")
    held, patient, urgent = request_of(3), request_of(4), request_of(2, deadline_s=5.0)
    await intake.admit(held)
    waiting = [asyncio.create_task(intake.admit(each)) for each in (patient, urgent)]
    await asyncio.sleep(1)
    small = request_of(1, deadline_s=2.0)
    await intake.admit(small)  # fits, and nobody who waits goes before it
    intake.leave(held)
    await waiting[1]
    assert not waiting[0].done()
    for each in (small, urgent):
        intake.leave(each)
    await waiting[0]
    intake.leave(patient)
    assert pool.usage().is_idle


@virtual
async def test_places_are_limited_as_blocks_are() -> None:
    intake, _ = intake_of(8, max_num_requests=1)
    first, second = request_of(1), request_of(1)
    await intake.admit(first)
    waiting = asyncio.create_task(intake.admit(second))
    await asyncio.sleep(1)
    assert not waiting.done()
    intake.leave(first)
    await waiting


@virtual
async def test_full_queue_refuses_at_once_with_advice() -> None:
    intake, _ = intake_of(1, max_num_queued=1)
    await intake.admit(request_of(1))
    waiting = asyncio.create_task(intake.admit(request_of(1)))
    await asyncio.sleep(0)
    with pytest.raises(Refused) as caught:
        await intake.admit(request_of(1))
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after_s > 0
    waiting.cancel()


@virtual
async def test_request_larger_than_the_pool_is_refused_with_both_sizes() -> None:
    intake, _ = intake_of(2)
    with pytest.raises(BadRequest, match="need 3 KV blocks; the decode worker has 2") as caught:
        await intake.admit(request_of(3))
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG  # at no later time it would fit


@virtual
async def test_waiting_ends_after_the_queue_time_and_lets_the_next_one_in() -> None:
    intake, pool = intake_of(4, queue_s=5.0)
    held, large, small = request_of(2), request_of(4), request_of(1)
    await intake.admit(held)
    first = asyncio.create_task(intake.admit(large))
    await asyncio.sleep(2)
    second = asyncio.create_task(intake.admit(small))
    await asyncio.wait([first])
    error = first.exception()
    assert isinstance(error, Refused)
    assert error.reason is Reason.QUEUE_TIMEOUT
    await second
    assert asyncio.get_running_loop().time() == pytest.approx(1005.0)
    for each in (held, small):
        intake.leave(each)
    assert pool.usage().is_idle


@virtual
async def test_cancelled_while_waiting_lets_the_next_one_in() -> None:
    intake, pool = intake_of(4)
    held, large, small = request_of(2), request_of(4), request_of(1)
    await intake.admit(held)
    first = asyncio.create_task(intake.admit(large))
    second = asyncio.create_task(intake.admit(small))
    await asyncio.sleep(1)
    first.cancel()
    await second
    assert first.cancelled()
    for each in (held, small):
        intake.leave(each)
    assert pool.usage().is_idle


@pytest.mark.parametrize("is_admitted_first", [True, False])
def test_cancelled_and_admitted_in_one_turn_returns_its_blocks(is_admitted_first: bool) -> None:
    @virtual
    async def run() -> None:
        intake, pool = intake_of(1)
        held, waiting = request_of(1), request_of(1)
        await intake.admit(held)
        task = asyncio.create_task(intake.admit(waiting))
        await asyncio.sleep(1)
        if is_admitted_first:
            intake.leave(held)
            task.cancel()
        else:
            task.cancel()
            intake.leave(held)
        await asyncio.wait([task])
        assert task.cancelled()
        assert pool.usage().is_idle
        assert intake.num_admitted == intake.num_waiting == 0

    run()


@virtual
async def test_cached_prefix_is_shared_and_its_last_token_is_not() -> None:
    intake, _ = intake_of(8)
    first = request_of(3)
    await intake.admit(first)
    assert first.table is not None
    first.table.hold_rest()
    await first.table.publish(first.names)
    second = request_of(3)
    await intake.admit(second)
    assert second.table is not None
    assert second.table.block_ids[:2] == first.table.block_ids[:2]
    assert second.num_cached_tokens == 2 * BLOCK_SIZE
