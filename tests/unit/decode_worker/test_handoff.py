"""Prefill workers that die, refuse, lie and leave; the answer stays right."""

import asyncio
import dataclasses
from typing import Any

import pytest
import structlog

from deploy.simulated.virtual_time import virtual
from kvtransfer.reading import BlockReader
from pdserve.domain.errors import Reason, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import (
    BlocksOffered,
    BlocksPulled,
    EndHandoff,
    HandoffFailed,
    HandoffHello,
    HandoffRefused,
    KvMoved,
    StartHandoff,
)
from pdserve.domain.tokens import Completed, Failed, SampledToken
from tests.support.kv_handoff import reader_of
from tests.support.worker_pair import (
    BLOCK_SIZE,
    LAYOUT,
    Call,
    PairTransport,
    Sizes,
    WorkerPair,
    oracle,
)

PROMPT = tuple(range(10, 40))
ALONE = Sizes(num_prefill=0)


def assert_right(call: Call) -> Completed:
    assert isinstance(call.end, Completed), call.end
    assert call.token_ids == oracle(call.submit.prompt_token_ids, call.submit.sampling)
    return call.end


def test_stream_lost_at_any_moment_is_made_good_by_another_worker() -> None:
    helpers = set()

    @virtual
    async def run(after_s: float) -> None:
        async with WorkerPair(Sizes(num_prefill=2), delay_s=lambda: 0.003) as pair:
            pair.transport.block_s = lambda: 0.004
            call = pair.submit(PROMPT, max_tokens=6)
            await asyncio.sleep(after_s)
            pair.prefill[0].cut()
            helpers.add((await call.completed()).timeline.prefill_worker)
            assert_right(call)

    for step in range(50):
        run(step * 0.0047)
    assert helpers == {"prefill-0", "prefill-1"}


def test_death_of_the_only_worker_at_any_moment_is_made_good_here() -> None:
    @virtual
    async def run(after_s: float) -> None:
        async with WorkerPair(delay_s=lambda: 0.003) as pair:
            pair.transport.block_s = lambda: 0.004
            call = pair.submit(PROMPT, max_tokens=6)
            await asyncio.sleep(after_s)
            await pair.prefill[0].kill()
            await call.completed()
            assert_right(call)

    for step in range(50):
        run(step * 0.0047)


@virtual
async def test_first_token_is_not_sent_twice_when_the_blocks_are_read_again() -> None:
    async with WorkerPair() as pair:
        peer = await pair.script_prefill()
        targets = (peer.target, pair.prefill[0].target)
        call = pair.submit(PROMPT, max_tokens=6, targets=targets)
        start = await peer.hear(StartHandoff)
        _, done = await peer.read(start)
        peer.stream.try_send(done)
        await call.has_begun.wait()
        peer.stream.abort()
        await call.completed()
        assert_right(call)


@virtual
async def test_landed_blocks_are_kept_and_only_the_rest_is_asked_of_the_next() -> None:
    async with WorkerPair() as pair:
        peer = await pair.script_prefill()
        call = pair.submit(PROMPT, max_tokens=6, targets=(peer.target, pair.prefill[0].target))
        offer, _ = await peer.read(await peer.hear(StartHandoff))
        part = dataclasses.replace(offer, block_ids=offer.block_ids[:5], digests=offer.digests[:5])
        peer.stream.try_send(part)
        await peer.hear(BlocksPulled)
        peer.stream.abort()
        end = await call.completed()
        assert_right(call)
        block_bytes = pair.engine.kv.layout.block_bytes
        assert end.timeline.transferred_bytes == 8 * block_bytes, "no block travelled twice"


@pytest.mark.parametrize("num_tokens", [28, 29, 30])
def test_worker_lost_after_all_blocks_but_before_the_first_token(num_tokens: int) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair() as pair:
            peer = await pair.script_prefill()
            call = pair.submit(
                PROMPT[:num_tokens], max_tokens=6, targets=(peer.target, pair.prefill[0].target)
            )
            offer, _ = await peer.read(await peer.hear(StartHandoff))
            peer.stream.try_send(offer)
            await peer.hear(BlocksPulled)
            peer.stream.abort()
            await call.completed()
            assert_right(call)

    with structlog.testing.capture_logs() as logs:
        run()
    assert not [entry for entry in logs if entry["log_level"] == "error"]


@virtual
async def test_blocks_of_a_failed_handoff_are_not_read() -> None:
    """They may be another's by then: that would be counted, and told, as corruption."""
    async with WorkerPair(ALONE) as pair:
        peer = await pair.script_prefill()
        call = pair.submit(PROMPT, max_tokens=6, targets=(peer.target,))
        offer, _ = await peer.read(await peer.hear(StartHandoff))
        peer.stream.try_send(offer)
        failure = Failed(reason=Reason.INTERNAL, message="the engine failed on this batch")
        peer.stream.try_send(HandoffFailed(handoff=offer.handoff, failure=failure))
        peer.engine.kv.bytes[:] = bytes(peer.engine.kv.num_bytes)
        await call.completed()
        assert_right(call)
        assert pair.transport.num_reads == 0
        assert pair.handoffs.num_corrupt_blocks == 0


@virtual
async def test_unusable_logits_of_a_prompt_are_not_tried_elsewhere() -> None:
    async with WorkerPair() as pair:
        peer = await pair.script_prefill()
        targets = (peer.target, pair.prefill[0].target)
        call = pair.submit(PROMPT, max_tokens=6, targets=targets)
        start = await peer.hear(StartHandoff)
        failure = Failed(reason=Reason.UNUSABLE_LOGITS, message="NaN")
        peer.stream.try_send(HandoffFailed(handoff=start.handoff, failure=failure))
        assert await call.failed() == failure
        assert pair.prefill[0].loop.load(0, is_draining=False).num_steps == 0


@virtual
async def test_corrupt_block_is_read_again_and_counted() -> None:
    async with WorkerPair() as pair:
        damage = iter([False, True])
        pair.transport.is_corrupt = lambda: next(damage, False)
        call = pair.submit(PROMPT, max_tokens=6)
        await call.completed()
        assert_right(call)
        assert pair.handoffs.num_corrupt_blocks == 1


class StubbornTransport(PairTransport):
    """Its read fails where a correct one would be cancelled: the peer died in the same turn."""

    async def read(self, *args: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise TransferFailed("the peer is gone") from None


@virtual
async def test_answer_that_is_whole_is_no_failure_whatever_the_transfer_says() -> None:
    async with WorkerPair(Sizes(num_prefill=2)) as pair:

        async def open_reader(peer: HandoffHello) -> BlockReader:
            return reader_of(StubbornTransport(), peer.regions[0], pair.engine.kv)

        pair.links._open_reader = open_reader
        call = pair.submit(PROMPT, max_tokens=1)
        await call.completed()
        assert_right(call)
        assert pair.prefill[1].loop.load(0, is_draining=False).num_tokens == 0


@virtual
async def test_corruption_without_end_is_an_error_and_no_token_is_computed_from_it() -> None:
    async with WorkerPair(Sizes(num_prefill=2)) as pair:
        pair.transport.is_corrupt = lambda: True
        call = pair.submit(PROMPT, max_tokens=6)
        assert (await call.failed()).reason is Reason.KV_INTEGRITY
        assert len(call.tokens) <= 1
        assert pair.decode_loop.num_tokens == 0
        assert pair.transport.num_reads == 4, "twice from each"


@pytest.mark.parametrize("num_prefill", [1, 2])
def test_draining_prefill_worker_is_as_good_as_lost(num_prefill: int) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair(Sizes(num_prefill=num_prefill)) as pair:
            pair.prefill[0].service.is_draining = True
            call = pair.submit(PROMPT, max_tokens=6)
            end = await call.completed()
            assert_right(call)
            assert end.timeline.prefill_worker == ("" if num_prefill == 1 else "prefill-1")

    run()


@virtual
async def test_refusal_for_load_is_passed_on_with_its_advice() -> None:
    async with WorkerPair(ALONE) as pair:
        peer = await pair.script_prefill()
        call = pair.submit(PROMPT, max_tokens=6, targets=(peer.target,))
        start = await peer.hear(StartHandoff)
        failure = Failed(reason=Reason.OVERLOADED, message="full", retry_after_s=2.5)
        peer.stream.try_send(HandoffRefused(handoff=start.handoff, failure=failure))
        assert await call.failed() == failure


@virtual
async def test_prompt_that_a_prefill_worker_can_never_hold_is_read_elsewhere() -> None:
    async with WorkerPair(ALONE) as pair:
        peer = await pair.script_prefill()
        call = pair.submit(PROMPT, max_tokens=6, targets=(peer.target,))
        start = await peer.hear(StartHandoff)
        failure = Failed(reason=Reason.CONTEXT_TOO_LONG, message="needs 9 KV blocks; has 8")
        peer.stream.try_send(HandoffRefused(handoff=start.handoff, failure=failure))
        end = await call.completed()
        assert_right(call)
        assert end.timeline.prefill_worker == ""


@virtual
async def test_worker_of_another_life_is_not_used() -> None:
    async with WorkerPair() as pair:
        old = pair.prefill[0].target
        await pair.replace_prefill(0)
        call = pair.submit(PROMPT, max_tokens=6, targets=(old,))
        end = await call.completed()
        assert_right(call)
        assert end.timeline.prefill_worker == ""


LIES = {
    "a token beyond the vocabulary": lambda offer, done: [
        dataclasses.replace(done, first_token=SampledToken(2**31))
    ],
    "a logprob that is no number": lambda offer, done: [
        dataclasses.replace(done, first_token=SampledToken(1, float("nan")))
    ],
    "an infinite alternative": lambda offer, done: [
        dataclasses.replace(done, first_token=SampledToken(1, -1.0, ((2, -float("inf")),)))
    ],
    "a block beyond the region": lambda offer, done: [
        done,
        dataclasses.replace(offer, block_ids=tuple(BlockId(2**30) for _ in offer.block_ids)),
    ],
    "a place that was not asked for": lambda offer, done: [
        done,
        dataclasses.replace(offer, first_block=5),
    ],
    "no digests": lambda offer, done: [done, dataclasses.replace(offer, digests=())],
    "no blocks": lambda offer, done: [
        done,
        BlocksOffered(handoff=offer.handoff, first_block=0, block_ids=(), digests=()),
    ],
    "blocks of another handoff's digest": lambda offer, done: [
        done,
        dataclasses.replace(offer, digests=tuple(reversed(offer.digests))),
    ],
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_worker_ends_only_its_handoff(lie: str) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair() as pair:
            peer = await pair.script_prefill()
            other = pair.submit((*PROMPT[::-1], 3), max_tokens=9)
            call = pair.submit(PROMPT, max_tokens=6, targets=(peer.target, pair.prefill[0].target))
            offer, done = await peer.read(await peer.hear(StartHandoff))
            for message in LIES[lie](offer, done):
                peer.stream.try_send(message)
            await peer.hear(EndHandoff)
            await call.completed()
            await other.completed()
            assert_right(call)
            assert_right(other)

    with structlog.testing.capture_logs() as logs:
        run()
    assert not [entry for entry in logs if entry["log_level"] == "error"]


@virtual
async def test_leases_of_open_handoffs_are_renewed() -> None:
    async with WorkerPair() as pair:
        pair.transport.block_s = lambda: 5.0
        call = pair.submit(PROMPT, max_tokens=6)
        end = await call.completed()
        assert_right(call)
        assert end.timeline.transfer_s > 2 * pair.timers.lease_s
        assert end.timeline.transferred_bytes == 8 * pair.engine.kv.layout.block_bytes


@virtual
async def test_handoff_whose_lease_ran_out_is_told_and_read_elsewhere() -> None:
    async with WorkerPair(Sizes(num_prefill=2)) as pair:
        call = pair.submit(PROMPT, max_tokens=6)
        pair.transport.block_s = lambda: 0.2
        await call.has_begun.wait()
        for sender in pair.prefill[0].loop.senders._live.values():
            sender.expires_at_s = 0.0
        pair.prefill[0].loop._work.set()
        end = await call.completed()
        assert_right(call)
        assert end.timeline.total_s < 10


@virtual
async def test_what_landed_of_a_block_that_another_worker_then_spoils_is_not_relied_on() -> None:
    """Six tokens of the first worker end within a block, which the second damages and is lost."""
    sizes = Sizes(num_prefill=2, prefill_block_sizes=(6, BLOCK_SIZE), max_step_tokens=6)
    async with WorkerPair(sizes) as pair:
        num_reads = 0

        def is_corrupt() -> bool:
            nonlocal num_reads
            num_reads += 1
            pair.prefill[min(num_reads, 2) - 1].cut()
            return num_reads > 1

        pair.transport.is_corrupt = is_corrupt
        call = pair.submit(PROMPT, max_tokens=6)
        end = await call.completed()
        assert_right(call)
        assert num_reads >= 2
        assert end.timeline.prefill_worker == ""


@virtual
async def test_bytes_are_counted_for_each_pair_moved_skipped_and_retried() -> None:
    """Blocks of six tokens there, of four here: 30 tokens, then the same and ten more."""
    sizes = Sizes(prefill_block_sizes=(6,), max_local_prefill_tokens=0)
    async with WorkerPair(sizes) as pair:
        block_bytes = 6 * LAYOUT.block_bytes // BLOCK_SIZE
        await pair.submit(PROMPT, max_tokens=2).completed()
        [path] = pair.service.load(1).kv_paths
        assert path.moved == KvMoved(moved_bytes=5 * block_bytes)
        damaged = iter([True])
        pair.transport.is_corrupt = lambda: next(damaged, False)
        again = pair.submit((*PROMPT, *range(50, 60)), max_tokens=2)
        await again.completed()
        assert_right(again)
        [path] = pair.service.load(2).kv_paths
        # 28 tokens are held, so blocks from the fourth on are asked for: three, and one again.
        assert path.moved == KvMoved(
            moved_bytes=(5 + 3 + 1) * block_bytes,
            skipped_bytes=4 * block_bytes,
            retried_bytes=block_bytes,
        )
