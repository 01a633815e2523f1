"""A request's one end, whatever happens to it; nothing is held afterwards."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
import structlog

from deploy.simulated.virtual_time import VirtualTimeLoop, virtual
from pdserve.domain.errors import PeerFault, Reason, WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.messages import Cancel, PeerHello
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed, Failed, FinishReason, SampledToken
from pdserve.engine.contract import StepBatch, StepResult
from pdserve.rpc.streams import memory_stream_pair
from tests.support.worker_pair import Call, Sizes, WorkerPair, oracle, steps_of

PROMPT = tuple(range(10, 40))


def is_right(call: Call) -> bool:
    return call.token_ids == oracle(call.submit.prompt_token_ids, call.submit.sampling)


@virtual
async def test_answer_is_that_of_one_correct_worker() -> None:
    async with WorkerPair() as pair:
        call = pair.submit(PROMPT, max_tokens=6)
        end = await call.completed()
        assert is_right(call)
        assert end.reason is FinishReason.LENGTH
        assert end.timeline.prefill_worker == "prefill-0"
        assert end.timeline.decode_worker == "decode-0"
        assert end.timeline.transferred_bytes == 8 * pair.engine.kv.layout.block_bytes
        assert end.timeline.ttft_s < end.timeline.total_s


@virtual
async def test_prompt_that_is_read_here_is_reported_until_it_is_read() -> None:
    async with WorkerPair(Sizes(max_step_tokens=8, decode_steps=steps_of(1.0))) as pair:
        call = pair.submit(PROMPT, max_tokens=3, targets=[])
        seen = []
        for _ in range(4):
            await asyncio.sleep(0.9)
            seen.append(pair.service.load(0).waiting_prompt_tokens)
        assert seen == [30, 22, 14, 6]
        await call.completed()
        assert pair.service.load(0).waiting_prompt_tokens == 0


@virtual
async def test_answer_of_one_token_needs_no_step_of_the_decode_worker() -> None:
    async with WorkerPair() as pair:
        call = pair.submit(PROMPT, max_tokens=1)
        await call.completed()
        assert is_right(call)
        assert pair.decode_loop.num_steps == 0


@virtual
async def test_stop_at_the_first_token_abandons_the_transfer() -> None:
    async with WorkerPair() as pair:
        pair.transport.block_s = lambda: 1.0
        (first,) = oracle(PROMPT, pair.submit(PROMPT, max_tokens=1).submit.sampling)
        call = pair.submit(PROMPT, max_tokens=9, stop_token_ids=(first,))
        end = await call.completed()
        assert (call.token_ids, end.reason) == ((first,), FinishReason.STOP)
        assert asyncio.get_running_loop().time() < 1001.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": ()}, Reason.INVALID_FIELD),
        ({"prompt": (5, 2048)}, Reason.INVALID_FIELD),
        ({"prompt": (5,), "max_tokens": 0}, Reason.INVALID_FIELD),
        ({"prompt": (5,), "temperature": math.nan}, Reason.INVALID_FIELD),
        ({"prompt": (5,), "stop_token_ids": (2048,)}, Reason.INVALID_FIELD),
        ({"prompt": (5,), "deadline_s": math.nan}, Reason.INVALID_FIELD),
        ({"prompt": (5,), "max_tokens": 1024}, Reason.CONTEXT_TOO_LONG),
    ],
)
def test_request_that_makes_no_sense_is_refused_and_reaches_no_batch(
    changes: dict[str, Any], reason: Reason
) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair() as pair:
            good = pair.submit(PROMPT, max_tokens=6, targets=())
            bad = pair.submit(**{"targets": (), **changes})
            assert (await bad.failed()).reason is reason
            await good.completed()
            assert is_right(good)

    run()


def test_deadline_ends_a_request_in_every_phase() -> None:
    reached = set()

    @virtual
    async def run(deadline_s: float) -> None:
        async with WorkerPair(Sizes(decode_blocks=12)) as pair:
            pair.transport.block_s = lambda: 0.01
            holder = pair.submit(PROMPT, max_tokens=12)
            call = pair.submit(PROMPT, max_tokens=12, deadline_s=deadline_s)
            await asyncio.sleep(deadline_s)
            usage = pair.pool.usage()
            reached.add((pair.intake.num_waiting, usage.reserved > 0, len(call.tokens) > 0))
            await call.has_ended.wait()
            if isinstance(call.end, Completed):
                return
            failed = await call.failed()
            assert failed.reason is Reason.DEADLINE
            assert str(len(call.tokens)) in failed.message
            await holder.completed()

    for step in range(1, 40):
        run(step * 0.0137)
    assert len(reached) >= 4, reached


def test_cancel_at_any_moment_gives_everything_back() -> None:
    @virtual
    async def run(after_s: float) -> None:
        async with WorkerPair(Sizes(num_prefill=2), delay_s=lambda: 0.003) as pair:
            pair.transport.block_s = lambda: 0.004
            other = pair.submit(PROMPT, max_tokens=5)
            call = pair.submit((*PROMPT, 7), max_tokens=8)
            await asyncio.sleep(after_s)
            if not call.ends:
                pair.cancel(call)
                await asyncio.sleep(0.2)
                assert not call.ends
            await other.completed()
            assert is_right(other)
            await pair.assert_quiet(within_s=0.5)

    for step in range(60):
        run(step * 0.0051)


@virtual
async def test_deadline_is_told_after_a_handoff_failed() -> None:
    """CPython 3.11 counts a parent as cancelled for good if a task group member raises late."""
    async with WorkerPair(Sizes(num_prefill=2)) as pair:
        slow = {"pauses": 0}

        def pause_s() -> float:
            slow["pauses"] += 1
            return 0.0 if pair.transport.num_reads <= 2 else 100.0

        pair.transport.block_s = pause_s
        pair.transport.is_corrupt = lambda: True
        call = pair.submit(PROMPT, max_tokens=8, deadline_s=5.0)
        failed = await call.failed()
        assert failed.reason is Reason.DEADLINE
        assert pair.transport.num_reads > 2
        await asyncio.sleep(100)


@virtual
async def test_last_token_that_is_there_at_the_deadline_is_an_answer() -> None:
    """It counts as output already, but was not sent: a failure would leave a gap."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    async with WorkerPair(Sizes(num_prefill=0, max_step_tokens=64)) as pair:
        call = pair.submit(PROMPT, max_tokens=2, deadline_s=60.0)
        await call.has_begun.wait()
        await asyncio.sleep(0.001)
        # The deadline passes between the end of the last step and the turn that hears of it.
        loop.call_at(pair.engine._free_at_s, loop.block, 60.0)
        await call.completed()
        assert is_right(call)


@virtual
async def test_newer_attempt_replaces_an_older_one_and_an_older_one_is_dropped() -> None:
    async with WorkerPair() as pair:
        first = pair.submit(PROMPT, name="a", attempt=1, max_tokens=6)
        second = pair.submit(PROMPT, name="a", attempt=2, max_tokens=6)
        late = pair.submit(PROMPT, name="a", attempt=1, max_tokens=6)
        await second.completed()
        assert is_right(second)
        pair.router.try_send(Cancel(request_id=late.submit.request_id, attempt=1))
        await asyncio.sleep(1)
        assert not first.ends
        assert not late.ends


@virtual
async def test_loss_of_the_router_ends_all_it_had() -> None:
    async with WorkerPair() as pair:
        calls = [pair.submit((*PROMPT, i), max_tokens=12) for i in range(8)]
        await asyncio.sleep(0.07)
        pair.router.abort()
        await asyncio.sleep(0.05)
        assert pair.is_idle(), pair.holdings()
        assert not any(call.ends for call in calls)
        await pair.link_router()
        call = pair.submit(PROMPT, max_tokens=6)
        await call.completed()


class BrokenEngine:
    """An engine whose steps fail while `is_broken`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.is_broken = False

    async def step(self, batch: StepBatch) -> StepResult:
        result: StepResult = await self.inner.step(batch)
        if self.is_broken:
            raise RuntimeError("a prompt that must not leak")
        return result


@virtual
async def test_failed_step_ends_its_requests_and_the_worker_goes_on() -> None:
    async with WorkerPair(Sizes(num_prefill=0)) as pair:
        broken = BrokenEngine(pair.engine)
        pair.decode_loop._engine = broken  # type: ignore[assignment]
        calls = [pair.submit((*PROMPT, i), max_tokens=6) for i in range(3)]
        await asyncio.sleep(0.02)
        broken.is_broken = True
        with structlog.testing.capture_logs():
            for call in calls:
                failed = await call.failed()
                assert failed.reason is Reason.INTERNAL
                assert "prompt" not in failed.message
        broken.is_broken = False
        again = pair.submit(PROMPT, max_tokens=6)
        await again.completed()
        assert is_right(again)


class GuiltyEngine:
    """An engine that draws nothing for the sequence that feeds `poison` to a decode step.

    It raises, which takes the whole step with it, or says which row has failed.
    """

    def __init__(self, inner: Any, poison: int, failure: Failed | None) -> None:
        self.inner, self.poison, self.failure = inner, poison, failure

    async def step(self, batch: StepBatch) -> StepResult:
        is_guilty = [each.token_ids == (self.poison,) for each in batch.sequences]
        if self.failure is None and any(is_guilty):
            raise RuntimeError("a prompt that must not leak")
        result: StepResult = await self.inner.step(batch)
        rows = zip(is_guilty, result.sampled, strict=True)
        return replace(result, sampled=tuple(self.failure if bad else drawn for bad, drawn in rows))


@pytest.mark.parametrize(
    "failure", [None, Failed(reason=Reason.UNUSABLE_LOGITS, message="NaN at token 3")]
)
@virtual
async def test_failed_row_ends_its_request_and_no_other_one(failure: Failed | None) -> None:
    poison = oracle((*PROMPT, 1), SamplingParams(max_tokens=4))[2]
    async with WorkerPair(Sizes(num_prefill=0)) as pair:
        engine = GuiltyEngine(pair.engine, poison, failure)
        pair.decode_loop._engine = engine  # type: ignore[assignment]
        calls = [pair.submit((*PROMPT, i), max_tokens=9) for i in range(4)]
        with structlog.testing.capture_logs():
            for index in (0, 2, 3):
                await calls[index].completed()
                assert is_right(calls[index])
            failed = await calls[1].failed()
        assert len(calls[1].tokens) == 3, "what came before stands"
        assert failed.reason is (Reason.INTERNAL if failure is None else Reason.UNUSABLE_LOGITS)
        assert "prompt" not in failed.message


class WrongEngine(GuiltyEngine):
    """Draws a token id that no tokenizer knows instead of failing."""

    async def step(self, batch: StepBatch) -> StepResult:
        result: StepResult = await self.inner.step(batch)
        sampled = tuple(
            SampledToken(-1) if each.token_ids == (self.poison,) else drawn
            for each, drawn in zip(batch.sequences, result.sampled, strict=True)
        )
        return replace(result, sampled=sampled)


@virtual
async def test_token_that_has_no_text_ends_its_request_and_no_other_one() -> None:
    poison = oracle((*PROMPT, 1), SamplingParams(max_tokens=4))[2]
    async with WorkerPair(Sizes(num_prefill=0)) as pair:
        pair.decode_loop._engine = WrongEngine(pair.engine, poison, None)  # type: ignore[assignment]
        calls = [pair.submit((*PROMPT, i), max_tokens=9) for i in range(4)]
        with structlog.testing.capture_logs():
            for index in (0, 2, 3):
                await calls[index].completed()
                assert is_right(calls[index])
            assert (await calls[1].failed()).reason is Reason.INTERNAL


@virtual
async def test_draining_worker_ends_what_it_has_and_takes_nothing_new() -> None:
    async with WorkerPair() as pair:
        running = pair.submit(PROMPT, max_tokens=8)
        await asyncio.sleep(0.05)
        pair.service.is_draining = True
        late = pair.submit(PROMPT, max_tokens=8)
        assert (await late.failed()).reason is Reason.DRAINING
        await pair.service.wait_idle()
        await pair.service.close()
        await running.completed()
        assert is_right(running)


@virtual
async def test_close_ends_what_is_left_before_it_returns() -> None:
    async with WorkerPair() as pair:
        pair.transport.block_s = lambda: 0.5
        pair.submit(PROMPT, max_tokens=8)
        await asyncio.sleep(0.3)
        assert not pair.pool.usage().is_idle
        await pair.service.close()
        assert pair.pool.usage().is_idle


@virtual
async def test_peer_that_says_nothing_is_not_waited_for() -> None:
    async with WorkerPair() as pair:
        _, served = memory_stream_pair("mute", "decode-0")
        with pytest.raises(WorkerLost, match="said nothing for 2 s"):
            await pair.service.handle(served)


@virtual
async def test_peer_of_another_protocol_version_is_refused() -> None:
    async with WorkerPair() as pair:
        router, served = memory_stream_pair("old", "decode-0")
        router.try_send(
            PeerHello(peer_id="old", epoch=Epoch(1), protocol_version=PROTOCOL_VERSION + 1)
        )
        with pytest.raises(PeerFault, match="protocol versions differ"):
            await pair.service.handle(served)
