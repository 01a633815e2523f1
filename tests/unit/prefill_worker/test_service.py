"""A prefill worker and the streams of its decode workers, which the test plays."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import structlog

from deploy.simulated.virtual_time import virtual
from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault, Reason, WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, HandoffId, RequestId
from pdserve.domain.messages import (
    BlocksOffered,
    BlocksPulled,
    EndHandoff,
    HandoffFailed,
    HandoffHello,
    HandoffRefused,
    PrefillDone,
    PrefillToDecode,
    RenewLeases,
    StartHandoff,
)
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed
from pdserve.engine.contract import StepBatch, StepResult
from pdserve.observe.watch import PrefillWatch
from pdserve.rpc.memory_network import serve_like_grpc
from pdserve.rpc.streams import MAX_NUM_BUFFERED_MESSAGES, MemoryStream, memory_stream_pair
from tests.support.worker_pair import (
    PrefillNode,
    Sizes,
    WorkerPair,
    hello_of,
    oracle,
)

PROMPT = tuple(range(10, 40))
SAMPLING = SamplingParams(max_tokens=4)


class Decode:
    """A decode worker that the test plays."""

    def __init__(self, node: PrefillNode) -> None:
        self.node = node
        self.stream: MemoryStream[Any, PrefillToDecode]
        self.stream, served = memory_stream_pair("decode", node.name)
        self.serving = asyncio.create_task(
            serve_like_grpc(node.service.handle, served, self.stream)
        )
        self.stream.try_send(hello_of("decode", node.epoch))

    def start(self, name: str = "r", retry: int = 0, **changes: Any) -> HandoffId:
        fields = {
            "handoff": HandoffId(RequestId(name), 1, retry),
            "prompt_token_ids": PROMPT,
            "first_block": 0,
            "sampling": SAMPLING,
            "deadline_s": 60.0,
            **changes,
        }
        assert self.stream.try_send(StartHandoff(**fields))
        handoff: HandoffId = fields["handoff"]
        return handoff

    async def hear(self, kind: type[Any] | tuple[type[Any], ...]) -> Any:
        while True:
            message = await self.stream.receive()
            if isinstance(message, kind):
                return message


@contextlib.asynccontextmanager
async def prefill(
    timers: Timers | None = None, **sizes: Any
) -> AsyncIterator[tuple[WorkerPair, PrefillNode, Decode]]:
    async with WorkerPair(Sizes(**sizes), timers=timers) as pair:
        node = pair.prefill[0]
        decode = Decode(node)
        await decode.hear(HandoffHello)
        yield pair, node, decode
        decode.stream.abort()
        await asyncio.wait([decode.serving])


@virtual
async def test_first_token_comes_before_the_last_blocks_and_pulling_gives_back() -> None:
    async with prefill(max_step_tokens=64) as (_, node, decode):
        handoff = decode.start()
        done = await decode.hear(PrefillDone)
        assert (done.first_token.token_id,) == oracle(PROMPT, SAMPLING)[:1]
        offer = await decode.hear(BlocksOffered)
        assert node.pool.usage().pinned == len(offer.block_ids) == 8
        decode.stream.try_send(BlocksPulled(handoff=handoff, first_block=0, num_blocks=8))
        await asyncio.sleep(0.01)
        assert node.pool.usage().pinned == 0
        decode.stream.try_send(EndHandoff(handoff))
        await asyncio.sleep(0.01)
        assert node.is_idle()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_token_ids": ()}, Reason.INTERNAL),
        ({"first_block": 8}, Reason.INTERNAL),
        ({"prompt_token_ids": (2048,)}, Reason.INVALID_FIELD),
        ({"sampling": SamplingParams(temperature=math.nan)}, Reason.INVALID_FIELD),
        ({"sampling": SamplingParams(stop_token_ids=(2048,))}, Reason.INVALID_FIELD),
        ({"deadline_s": math.nan}, Reason.INVALID_FIELD),
        ({"prompt_token_ids": (7,) * 1025}, Reason.CONTEXT_TOO_LONG),
        ({"prompt_token_ids": (7,) * 300}, Reason.CONTEXT_TOO_LONG),  # its blocks
    ],
)
def test_handoff_that_makes_no_sense_is_refused_and_reaches_no_batch(
    changes: dict[str, Any], reason: Reason
) -> None:
    @virtual
    async def run() -> None:
        async with prefill() as (_, _, decode):
            decode.start("bad", **changes)
            decode.start("good")
            refused = await decode.hear(HandoffRefused)
            assert refused.handoff.request_id == "bad"
            assert refused.failure.reason is reason
            done = await decode.hear(PrefillDone)
            assert done.handoff.request_id == "good"

    run()


@virtual
async def test_full_queue_refuses_with_the_time_it_takes_to_drain() -> None:
    async with prefill(max_num_requests=1, max_num_waiting=1) as (_, _, decode):
        for name in range(2):
            decode.start(str(name))
            await asyncio.sleep(0.005)
        decode.start("2")
        refused = await decode.hear(HandoffRefused)
        assert refused.failure.reason is Reason.OVERLOADED
        assert refused.failure.retry_after_s > 0


@pytest.mark.parametrize(("deadline_s", "waited_s"), [(0.5, 0.5), (600.0, 1.5)])
@virtual
async def test_handoff_that_never_fits_is_refused_after_the_longest_wait(
    deadline_s: float, waited_s: float
) -> None:
    timers = Timers(queue_s=1.5)
    async with prefill(timers=timers, prefill_blocks=8) as (_, node, decode):
        decode.start("0")
        await decode.hear(PrefillDone)  # and keeps its 8 blocks
        began_s = asyncio.get_running_loop().time()
        decode.start("1", deadline_s=deadline_s)
        refused = await decode.hear(HandoffRefused)
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(waited_s)
        assert refused.handoff.request_id == "1"
        assert refused.failure.reason is Reason.QUEUE_TIMEOUT
        assert len(node.loop.queue) == 0


@virtual
async def test_lease_that_runs_out_is_told_and_a_renewed_one_does_not() -> None:
    async with prefill() as (pair, node, decode):
        kept = decode.start("kept")
        decode.start("left")
        for _ in range(2):
            await decode.hear(PrefillDone)

        async def renew() -> None:
            while True:
                await asyncio.sleep(pair.timers.renew_s)
                decode.stream.try_send(RenewLeases((kept,)))

        renewing = asyncio.create_task(renew())
        failed = await decode.hear(HandoffFailed)
        assert failed.handoff.request_id == "left"
        assert failed.failure.reason is Reason.TRANSFER_FAILED
        await asyncio.sleep(30)
        assert [handoff for _, handoff in node.loop.senders._live] == [kept]
        assert node.pool.usage().pinned == 8
        renewing.cancel()


@virtual
async def test_peer_that_renews_for_ever_keeps_blocks_until_its_deadline_only() -> None:
    async with prefill() as (_, node, decode):
        began_s = asyncio.get_running_loop().time()
        handoff = decode.start(deadline_s=25.0)

        async def renew() -> None:
            while True:
                decode.stream.try_send(RenewLeases((handoff,)))
                await asyncio.sleep(1)

        renewing = asyncio.create_task(renew())
        async with asyncio.timeout(60):
            failed = await decode.hear(HandoffFailed)
        assert failed.failure.reason is Reason.TRANSFER_FAILED
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(25.0, abs=0.1)
        assert node.is_idle()
        renewing.cancel()


class CountingWatch(PrefillWatch):
    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.num_sent_blocks = 0

    def message_dropped(self, why: str) -> None:
        self.dropped[why] += 1

    def blocks_sent(self, num_blocks: int) -> None:
        self.num_sent_blocks += num_blocks


@virtual
async def test_messages_that_are_late_or_senseless_are_counted_and_change_nothing() -> None:
    async with prefill(max_step_tokens=64) as (_, node, decode):
        watch = node.service._watch = CountingWatch()
        handoff = decode.start()
        await decode.hear(BlocksOffered)
        pulled = BlocksPulled(handoff=handoff, first_block=0, num_blocks=8)
        nobody = HandoffId(RequestId("nobody"), 1, 0)
        late = [pulled, BlocksPulled(handoff=nobody, first_block=0, num_blocks=1)]
        for message in (pulled, *late, EndHandoff(nobody), RenewLeases((nobody,))):
            decode.stream.try_send(message)
        decode.start()
        decode.stream.try_send(hello_of("decode", node.epoch))
        await asyncio.sleep(0.1)
        assert watch.dropped == {"late": 3, "violation": 2}
        assert watch.num_sent_blocks == 8
        assert len(node.loop.senders) == 1
        decode.stream.try_send(EndHandoff(handoff))
        decode.stream.try_send(EndHandoff(handoff))
        await asyncio.sleep(0.1)
        assert watch.dropped == {"late": 4, "violation": 2}
        assert node.is_idle()


@virtual
async def test_start_that_comes_again_after_its_end_or_refusal_is_not_read() -> None:
    async with prefill(max_num_requests=1, max_num_waiting=1) as (_, node, decode):
        running = decode.start("running")
        await asyncio.sleep(0.001)
        waiting, refused = decode.start("waiting"), decode.start("refused")
        assert (await decode.hear(HandoffRefused)).handoff == refused
        for handoff in (waiting, running):
            decode.stream.try_send(EndHandoff(handoff))
        await asyncio.sleep(1.0)
        for handoff in (running, waiting, refused):
            decode.start(handoff=handoff)
        await asyncio.sleep(1.0)
        assert node.is_idle()
        assert node.loop.load(0, is_draining=False).num_tokens <= len(PROMPT)


@virtual
async def test_pull_of_what_was_not_offered_ends_that_handoff_and_says_so() -> None:
    async with prefill() as (_, node, decode):
        bad, good = decode.start("bad"), decode.start("good")
        for _ in range(2):
            await decode.hear(PrefillDone)
        await asyncio.sleep(0.1)
        decode.stream.try_send(BlocksPulled(handoff=bad, first_block=3, num_blocks=99))
        failed = await decode.hear(HandoffFailed)
        assert failed.handoff == bad
        assert [handoff for _, handoff in node.loop.senders._live] == [good]


@virtual
async def test_decode_worker_that_does_not_read_loses_its_stream_and_its_blocks() -> None:
    async with prefill() as (_, node, decode):
        decode.start()
        with structlog.testing.capture_logs():
            for index in range(MAX_NUM_BUFFERED_MESSAGES + 1):
                decode.stream.try_send(
                    StartHandoff(
                        handoff=HandoffId(RequestId(f"bad{index}"), 1, 0),
                        prompt_token_ids=(2048,),
                        first_block=0,
                        sampling=SAMPLING,
                        deadline_s=60.0,
                    )
                )
                await asyncio.sleep(0)
            await asyncio.sleep(1)
        assert decode.serving.done()
        assert node.is_idle()


@virtual
async def test_loss_of_the_stream_during_a_step_frees_its_blocks_after_the_step() -> None:
    async with prefill(max_step_tokens=64) as (_, node, decode):
        decode.start()
        await asyncio.sleep(0.01)
        assert node.pool.usage().held == 8
        decode.stream.abort()
        await asyncio.sleep(0.001)
        assert node.pool.usage().held == 8, "the step still writes them"
        await asyncio.sleep(0.1)
        assert node.is_idle()


class BrokenEngine:
    def __init__(self, inner: Any) -> None:
        self.spec, self.kv = inner.spec, inner.kv

    async def step(self, batch: StepBatch) -> StepResult:
        await asyncio.sleep(0.01)
        raise RuntimeError("a prompt that must not leak")


@virtual
async def test_failed_step_is_told_and_the_worker_goes_on() -> None:
    async with prefill() as (_, node, decode):
        engine = node.loop._engine
        node.loop._engine = BrokenEngine(engine)  # type: ignore[assignment]
        decode.start("0")
        with structlog.testing.capture_logs():
            failed = await decode.hear(HandoffFailed)
        assert failed.failure.reason is Reason.INTERNAL
        assert "prompt" not in failed.failure.message
        node.loop._engine = engine
        decode.start("1")
        await decode.hear(PrefillDone)


class GuiltyEngine:
    """An engine that fails on the sequences that contain `poison`: see the decode worker's test."""

    def __init__(self, inner: Any, poison: int, failure: Failed | None) -> None:
        self.spec, self.kv = inner.spec, inner.kv
        self.inner, self.poison, self.failure = inner, poison, failure

    async def step(self, batch: StepBatch) -> StepResult:
        is_guilty = [self.poison in each.token_ids for each in batch.sequences]
        if self.failure is None and any(is_guilty):
            raise RuntimeError("a prompt that must not leak")
        result: StepResult = await self.inner.step(batch)
        rows = zip(is_guilty, result.sampled, strict=True)
        return replace(result, sampled=tuple(self.failure if bad else drawn for bad, drawn in rows))


@pytest.mark.parametrize("failure", [None, Failed(reason=Reason.UNUSABLE_LOGITS, message="NaN")])
@virtual
async def test_failed_row_ends_its_handoff_and_no_other_one(failure: Failed | None) -> None:
    async with prefill(max_step_tokens=99) as (_, node, decode):
        node.loop._engine = GuiltyEngine(node.loop._engine, 7, failure)  # type: ignore[assignment]
        with structlog.testing.capture_logs():
            good, bad, fine = (
                decode.start(name, prompt_token_ids=(*PROMPT[:20], token))
                for name, token in (("0", 8), ("1", 7), ("2", 9))
            )
            heard: dict[HandoffId, PrefillDone | HandoffFailed] = {}
            while len(heard) < 3:
                message = await decode.hear((PrefillDone, HandoffFailed))
                heard[message.handoff] = message
        failed = heard[bad]
        assert isinstance(failed, HandoffFailed)
        assert failed.failure.reason is (failure.reason if failure else Reason.INTERNAL)
        assert "prompt" not in failed.failure.message
        assert isinstance(heard[good], PrefillDone)
        assert isinstance(heard[fine], PrefillDone)


@virtual
async def test_draining_refuses_new_handoffs_and_ends_with_the_last() -> None:
    async with prefill() as (_, node, decode):
        handoff = decode.start()
        await decode.hear(PrefillDone)
        node.service.is_draining = True
        decode.start("late")
        assert (await decode.hear(HandoffRefused)).failure.reason is Reason.DRAINING
        idle = asyncio.create_task(node.loop.wait_idle())
        await asyncio.sleep(1)
        assert not idle.done()
        decode.stream.try_send(EndHandoff(handoff))
        async with asyncio.timeout(1):
            await idle


@virtual
async def test_handoff_started_twice_is_read_once() -> None:
    async with prefill() as (_, node, decode):
        for _ in range(2):
            decode.start()
        await decode.hear(PrefillDone)
        await asyncio.sleep(1)
        assert node.loop.load(0, is_draining=False).num_tokens == len(PROMPT)


@virtual
async def test_peer_that_says_nothing_is_not_served() -> None:
    async with prefill() as (_, node, _):
        _, served = memory_stream_pair("mute", "prefill")
        with pytest.raises(WorkerLost, match="said nothing for 2 s"):
            await node.service.handle(served)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"protocol_version": 9},
            f"version: 9 at the decode worker, {PROTOCOL_VERSION} at",
        ),
        ({"model_hash": b"another"}, "model: .* at the decode worker"),
        ({"layout": None}, "too old"),
    ],
)
def test_peer_that_kv_cannot_go_to_is_told_why_and_not_served(
    change: dict[str, Any], why: str
) -> None:
    @virtual
    async def run() -> None:
        async with prefill() as (_, node, _):
            other, served = memory_stream_pair("other", "prefill")
            other.try_send(replace(hello_of("other", node.epoch), **change))
            with pytest.raises(PeerFault, match=why) as refused:
                await node.service.handle(served)
            assert refused.value.reason is Reason.INCOMPATIBLE_PEER

    run()


class HeldDigests:
    """The digests of `node`'s KV memory, which take until `go`."""

    def __init__(self, node: PrefillNode, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = asyncio.Event()
        self.num_running = 0
        self._inner = node.engine.kv.digests
        monkeypatch.setattr(node.engine.kv, "digests", self._digests)

    async def _digests(self, *args: Any) -> list[bytes]:
        self.num_running += 1
        await self.go.wait()
        self.num_running -= 1
        return await self._inner(*args)


def test_the_engine_steps_on_and_the_first_token_leaves_while_blocks_are_digested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @virtual
    async def run() -> None:
        async with prefill(max_step_tokens=8) as (_, node, decode):
            held = HeldDigests(node, monkeypatch)
            handoff = decode.start()
            await decode.hear(PrefillDone)  # its last chunk is computed
            assert (held.num_running, node.pool.usage().pinned) == (1, 2)
            held.go.set()
            offers = [await decode.hear(BlocksOffered) for _ in range(2)]
            assert [(each.first_block, len(each.block_ids)) for each in offers] == [(0, 2), (2, 6)]
            decode.stream.try_send(EndHandoff(handoff))

    run()


def test_a_handoff_that_ends_while_it_is_digested_keeps_its_blocks_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @virtual
    async def run() -> None:
        async with prefill(max_step_tokens=64, prefill_blocks=8) as (_, node, decode):
            held = HeldDigests(node, monkeypatch)
            handoff = decode.start("first")
            await decode.hear(PrefillDone)
            decode.stream.try_send(EndHandoff(handoff))
            decode.start("second")
            await asyncio.sleep(1.0)
            assert (len(node.loop.senders), node.pool.usage().free) == (0, 0)
            assert len(node.loop.queue) == 1, "no other prompt is read into these blocks"
            held.go.set()
            offer = await decode.hear(BlocksOffered)
            assert offer.handoff.request_id == "second"
            decode.stream.try_send(EndHandoff(offer.handoff))

    run()
