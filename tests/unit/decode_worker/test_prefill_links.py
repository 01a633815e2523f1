"""Streams to prefill workers come and go without taking the process with them."""

import asyncio
import dataclasses
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from decode_worker.prefill_links import PeerLink, PrefillLinks
from deploy.simulated.virtual_time import virtual
from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault, Reason
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, HandoffId, RequestId, WorkerId
from pdserve.domain.layout import ShardedLayout
from pdserve.domain.messages import (
    BlocksOffered,
    EndHandoff,
    HandoffFailed,
    HandoffHello,
    HandoffRefused,
    PrefillDone,
    PrefillTarget,
    PrefillToDecode,
    RenewLeases,
    StartHandoff,
)
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.observe.watch import DecodeWatch
from pdserve.rpc.streams import PrefillLink, iterate, memory_stream_pair
from tests.support.worker_pair import LAYOUT, Sizes, WorkerPair, hello_of, oracle

PROMPT = tuple(range(10, 40))
TARGET = PrefillTarget(worker_id=WorkerId("odd"), address="odd", epoch=Epoch(1))


@pytest.mark.parametrize("error", [ValueError("no such address"), OSError("no route")])
def test_link_that_fails_oddly_is_a_lost_worker(error: Exception) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair(Sizes(num_prefill=0)) as pair:

            async def fail(address: str, timers: Timers) -> PrefillLink:
                raise error

            pair.links._connect = fail
            call = pair.submit(PROMPT, max_tokens=4, targets=(TARGET,))
            await call.completed()
            assert call.token_ids == oracle(PROMPT, call.submit.sampling)

    with structlog.testing.capture_logs():
        run()


@virtual
async def test_requests_share_one_link_and_a_lost_one_is_opened_again() -> None:
    async with WorkerPair() as pair:
        calls = [pair.submit((*PROMPT, i), max_tokens=4) for i in range(5)]
        for call in calls:
            await call.completed()
        assert len(pair.prefill[0].wires) == 1
        [path] = pair.service.load(1).kv_paths
        assert (path.worker_id, path.transport) == ("prefill-0", "memory")
        assert path.moved.moved_bytes == pair.handoffs.num_bytes > 0
        pair.prefill[0].cut()
        await asyncio.sleep(0.1)
        assert pair.service.load(2).kv_paths == ()
        again = pair.submit(PROMPT[::-1], max_tokens=4)
        end = await again.completed()
        assert end.timeline.prefill_worker == "prefill-0"


@virtual
async def test_closing_does_not_wait_for_timers_nor_for_links_being_opened() -> None:
    async with WorkerPair(Sizes(num_prefill=0)) as pair:
        peer = await pair.script_prefill()

        async def connect(address: str, timers: Timers) -> PrefillLink:
            if address == peer.name:
                return peer.connect()
            await asyncio.Event().wait()
            raise AssertionError

        began_s = asyncio.get_running_loop().time()
        async with PrefillLinks(
            connect, pair.links._hello, pair.links._open_reader, Timers()
        ) as links:
            link = await links.get(peer.target)
            opening = asyncio.create_task(links.get(TARGET))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert asyncio.get_running_loop().time() == began_s
        assert link.is_lost
        await asyncio.wait([opening])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"protocol_version": 9}, f"protocol version: {PROTOCOL_VERSION} at the decode worker, 9"),
        ({"model_hash": b"another"}, "scripted: model: .* at the decode worker"),
        ({"layout": None}, "scripted: one of them is too old"),
        ({"layout": ShardedLayout(whole=LAYOUT, tp=1, pp=2)}, "scripted: no transport reaches it"),
        ({"regions": ()}, "scripted: no transport reaches it"),
    ],
)
def test_worker_that_kv_cannot_come_from_is_refused_before_anything_is_asked(
    change: dict[str, Any], why: str
) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair() as pair:
            peer = await pair.script_prefill()
            hello = dataclasses.replace(hello_of(peer.name, Epoch(1), (peer.region,)), **change)

            async def connect(address: str, timers: Timers) -> PrefillLink:
                theirs, peer.stream = memory_stream_pair("decode-0", peer.name)
                peer.stream.try_send(hello)
                return theirs

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pair.links, "_connect", connect)
                with pytest.raises(PeerFault, match=why) as refused:
                    await pair.links.get(peer.target)
            assert refused.value.reason is Reason.INCOMPATIBLE_PEER
            said = [message async for message in iterate(peer.stream)]
            assert [type(message) for message in said] == [HandoffHello]

    run()


def clog(link: PeerLink) -> None:
    """Fill what waits to be sent, as when the peer has read nothing for long."""
    while link.stream.try_send(RenewLeases(())):
        pass


@pytest.mark.parametrize("unsent", ["end", "pulled", "renewal"])
def test_message_that_cannot_be_sent_ends_the_stream_and_the_request_goes_on(unsent: str) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair() as pair:
            peer = await pair.script_prefill()
            targets = (peer.target, pair.prefill[0].target)
            call = pair.submit(PROMPT, max_tokens=4, targets=targets)
            other = pair.submit(PROMPT[::-1], max_tokens=4, targets=targets)
            offer, _ = await peer.read(await peer.hear(StartHandoff))
            await peer.hear(StartHandoff)
            link = await pair.links.get(peer.target)
            clog(link)
            match unsent:
                case "end":
                    pair.cancel(call)
                case "pulled":
                    peer.stream.try_send(offer)
                case "renewal":
                    await asyncio.sleep(pair.timers.renew_s)
            await asyncio.sleep(0.1)
            assert peer.stream.is_over
            assert link.is_lost
            for each in (other,) if unsent == "end" else (call, other):
                end = await each.completed()
                # Whose blocks have all landed computes its first token here.
                reader = "" if (unsent, each) == ("pulled", call) else "prefill-0"
                assert end.timeline.prefill_worker == reader
                assert each.token_ids == oracle(each.submit.prompt_token_ids, each.submit.sampling)

    with structlog.testing.capture_logs() as logs:
        run()
    kind = {"end": "EndHandoff", "pulled": "BlocksPulled", "renewal": "RenewLeases"}[unsent]
    assert [log["unsent"] for log in logs if log["event"] == "stream.aborted"] == [kind]


@virtual
async def test_start_that_never_went_out_is_taken_back_without_harm_to_others() -> None:
    async with WorkerPair() as pair:
        peer = await pair.script_prefill()
        other = pair.submit(PROMPT, max_tokens=4, targets=(peer.target,))
        offer, done = await peer.read(await peer.hear(StartHandoff))
        link = await pair.links.get(peer.target)
        clog(link)
        late = pair.submit(PROMPT[::-1], max_tokens=4, deadline_s=0.5, targets=(peer.target,))
        gone = pair.submit((*PROMPT, 3), max_tokens=4, targets=(peer.target,))
        await late.failed()
        pair.cancel(gone)
        await asyncio.sleep(0.01)
        assert not link.is_lost
        other_end = asyncio.create_task(other.completed())
        peer.stream.try_send(done)
        while not isinstance(await peer.hear(RenewLeases), RenewLeases):
            pass
        peer.stream.try_send(offer)
        end = await peer.hear(EndHandoff)
        assert end.handoff == offer.handoff, "nothing is said of what was not asked"
        await other_end


@virtual
async def test_lost_end_leaves_no_block_pinned_at_the_prefill_worker() -> None:
    """Nor does it stay until its lease is out: the end of the stream frees it."""
    async with WorkerPair() as pair:
        pair.transport.block_s = lambda: 60.0
        call = pair.submit(PROMPT, max_tokens=4)
        await call.has_begun.wait()
        node = pair.prefill[0]
        assert node.pool.usage().pinned > 0
        node.wires[0].flows.clear()
        clog(await pair.links.get(node.target))
        await asyncio.sleep(0.001)
        clog(await pair.links.get(node.target))
        pair.cancel(call)
        await asyncio.sleep(0.001)
        node.wires[0].flows.set()
        await asyncio.sleep(0.1)
        assert node.pool.usage().is_idle


class CountingWatch(DecodeWatch):
    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()

    def message_dropped(self, why: str) -> None:
        self.dropped[why] += 1


@virtual
async def test_messages_that_are_late_or_senseless_are_counted_and_end_no_other_handoff() -> None:
    async with WorkerPair() as pair:
        watch = pair.links._watch = CountingWatch()
        peer = await pair.script_prefill()
        targets = (peer.target, pair.prefill[0].target)
        call = pair.submit(PROMPT, max_tokens=4, targets=targets)
        other = pair.submit(PROMPT[::-1], max_tokens=4, targets=(peer.target,))
        offer, done = await peer.read(await peer.hear(StartHandoff))
        other_offer, other_done = await peer.read(await peer.hear(StartHandoff))
        nobody = HandoffId(RequestId("nobody"), 1, 0)
        failure = Failed(reason=Reason.INTERNAL, message="gave up")
        late: list[PrefillToDecode] = [
            HandoffHello(
                worker_id=WorkerId("again"),
                epoch=Epoch(1),
                protocol_version=PROTOCOL_VERSION,
                model_hash=b"",
                layout=None,
            ),
            HandoffRefused(handoff=nobody, failure=failure),
            HandoffFailed(handoff=nobody, failure=failure),
            BlocksOffered(handoff=nobody, first_block=0, block_ids=(), digests=()),
            PrefillDone(
                handoff=nobody,
                first_token=SampledToken(2**31),
                queue_s=0.0,
                prefill_s=0.0,
                cached_tokens=0,
            ),
        ]
        for message in (*late, other_done, other_done):
            peer.stream.try_send(message)
        await other.has_begun.wait()
        assert watch.dropped == {"late": len(late) + 1}
        with structlog.testing.capture_logs():
            peer.stream.try_send(dataclasses.replace(offer, first_block=3))
            assert (await peer.hear(EndHandoff)).handoff == offer.handoff
        peer.stream.try_send(done)
        peer.stream.try_send(other_offer)
        assert (await call.completed()).timeline.prefill_worker == "prefill-0"
        assert (await other.completed()).timeline.prefill_worker == peer.name
        assert watch.dropped == {"late": len(late) + 2, "violation": 1}


@pytest.mark.parametrize("is_refused", [True, False])
def test_no_end_is_sent_for_what_the_peer_has_ended(is_refused: bool) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair(Sizes(num_prefill=0)) as pair:
            peer = await pair.script_prefill()
            call = pair.submit(PROMPT, max_tokens=4, targets=(peer.target,))
            handoff = (await peer.hear(StartHandoff)).handoff
            kind = HandoffRefused if is_refused else HandoffFailed
            failure = Failed(reason=Reason.DRAINING, message="is leaving")
            peer.stream.try_send(kind(handoff=handoff, failure=failure))
            await call.completed()
            peer.stream.abort()
            assert [message async for message in iterate(peer.stream)] == []

    run()


class BrokenDetokenizer:
    def push(self, token_id: int) -> str:
        raise RuntimeError("a prompt that must not leak")


@virtual
async def test_first_token_that_cannot_be_taken_ends_its_request_and_no_other() -> None:
    async with WorkerPair() as pair:
        broken = pair.submit(PROMPT, max_tokens=4)
        other = pair.submit(PROMPT[::-1], max_tokens=4)
        tokenizer = pair.service._tokenizer
        detokenizers = iter([BrokenDetokenizer()])
        pair.service._tokenizer = SimpleNamespace(  # type: ignore[assignment]
            detokenizer=lambda *prompt, **options: (
                next(detokenizers, None) or tokenizer.detokenizer(*prompt, **options)
            )
        )
        with structlog.testing.capture_logs():
            failure = await broken.failed()
        assert failure.reason is Reason.INTERNAL
        assert "prompt" not in failure.message
        assert (await other.completed()).timeline.prefill_worker == "prefill-0"
        assert other.token_ids == oracle(PROMPT[::-1], other.submit.sampling)
