"""The real router on loopback; the tests play the decode workers, over the real services."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import EOF  # type: ignore[attr-defined]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.client.admin import AdminClient
from pdserve.config.processes import RouterSettings
from pdserve.config.timers import Timers
from pdserve.domain.errors import Reason, WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, RequestId, WorkerId
from pdserve.domain.messages import (
    Cancel,
    PeerHello,
    RequestOutput,
    Role,
    StepOutputs,
    Submit,
    WorkerHello,
)
from pdserve.domain.tokens import Completed, Failed, FinishReason, PhaseTimeline, SampledToken
from pdserve.rpc.channels import MAX_INTERNAL_MESSAGE_BYTES
from pdserve.rpc.links import connect_membership, decode_service
from pdserve.rpc.server import RpcServer
from pdserve.rpc.streams import DecodeServerLink, RegisterLink, iterate
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc, membership_pb2, membership_pb2_grpc, types_pb2
from router.app import ServedRouter, open_router
from router.building import Router
from router.in_flight import Outcome
from tests.unit.router.builders import make_hello, make_load

T = TypeVar("T")
PATIENT = Timers(suspect_s=20.0, dead_s=30.0)  # workers of these tests send no heartbeats
SOON_S = 20.0
SECRET = "canary-prompt"


async def soon(what: Awaitable[T]) -> T:
    """A test that would hang fails instead."""
    async with asyncio.timeout(SOON_S):
        return await what


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class ScriptedWorker:
    """A decode worker that says what the test tells it to."""

    def __init__(self, worker_id: str, epoch: int = 1) -> None:
        self.worker_id = worker_id
        self.epoch = Epoch(epoch)
        self.submits: asyncio.Queue[Submit] = asyncio.Queue()
        self.cancels: asyncio.Queue[Cancel] = asyncio.Queue()
        self.server: RpcServer
        self.membership: RegisterLink
        self._stream: DecodeServerLink | None = None

    async def start(self, served: ServedRouter) -> None:
        self.server = await RpcServer.start(
            "127.0.0.1",
            0,
            [decode_service(self._serve)],
            PATIENT,
            max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES,
        )
        await self.register(served, self.hello())
        await until(lambda: is_usable(served.router, self.worker_id))

    def hello(self, **changes: Any) -> WorkerHello:
        fields = {"epoch": self.epoch, "address": self.server.address, **changes}
        return make_hello(self.worker_id, **fields)

    async def register(self, served: ServedRouter, hello: WorkerHello) -> None:
        self.membership = await connect_membership(served.internal.address, PATIENT)
        await self.membership.send(hello)
        await soon(self.membership.receive())

    async def say(
        self,
        submit: Submit,
        first_index: int,
        count: int,
        *,
        end: Completed | Failed | None = None,
        text: str | None = None,
    ) -> None:
        """Send `count` tokens; token i has id i and text "i,"."""
        indices = range(first_index, first_index + count)
        output = RequestOutput(
            request_id=submit.request_id,
            attempt=submit.attempt,
            first_index=first_index,
            tokens=tuple(SampledToken(index) for index in indices),
            text="".join(f"{index}," for index in indices) if text is None else text,
            end=end,
        )
        await self.say_raw(output)

    async def say_raw(self, *outputs: RequestOutput) -> None:
        assert self._stream is not None
        await self._stream.send(StepOutputs(outputs))

    async def cut_stream(self) -> None:
        assert self._stream is not None
        await self._stream.close()

    async def kill(self) -> None:
        await self.server.close()
        await self.membership.close()

    async def _serve(self, stream: DecodeServerLink) -> None:
        await stream.receive()
        await stream.send(
            PeerHello(peer_id=self.worker_id, epoch=self.epoch, protocol_version=PROTOCOL_VERSION)
        )
        async for message in iterate(stream):
            self._stream = stream
            if isinstance(message, Submit):
                self.submits.put_nowait(message)
            elif isinstance(message, Cancel):
                self.cancels.put_nowait(message)


DONE = Completed(
    reason=FinishReason.LENGTH,
    cached_prompt_tokens=3,
    timeline=PhaseTimeline(prefill_s=0.5, prefill_worker="p0", decode_worker="d0"),
)


def is_usable(router: Router, worker_id: str) -> bool:
    view = router.membership.view(asyncio.get_running_loop().time())
    return any(w.is_usable for w in view.decode if w.hello.worker_id == worker_id)


def settings(**changes: Any) -> RouterSettings:
    fields: dict[str, Any] = {"port": 0, "internal_port": 0, "timers": PATIENT, **changes}
    return RouterSettings(**fields)


class Cluster:
    """A router, its client and the workers that a test starts."""

    def __init__(self, served: ServedRouter, channel: grpc.aio.Channel) -> None:
        self.served = served
        self.router = served.router
        self.channel = channel
        self.client: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self.workers: list[ScriptedWorker] = []

    async def worker(self, worker_id: str = "d0", epoch: int = 1) -> ScriptedWorker:
        worker = ScriptedWorker(worker_id, epoch)
        self.workers.append(worker)
        await worker.start(self.served)
        return worker

    def generate(self, max_tokens: int = 8, timeout: float | None = None, **fields: Any) -> Any:
        sampling = types_pb2.SamplingParams(max_tokens=max_tokens)
        return self.client.Generate(request(sampling=sampling, **fields), timeout=timeout)

    async def assert_nothing_is_held(self) -> None:
        await until(lambda: self.router.ledger.is_empty and len(self.router.in_flight) == 0)


@contextlib.asynccontextmanager
async def run_cluster(**changes: Any) -> AsyncIterator[Cluster]:
    async with open_router(settings(**changes)) as served:
        channel = grpc.aio.insecure_channel(served.public.address)
        cluster = Cluster(served, channel)
        try:
            yield cluster
            await cluster.assert_nothing_is_held()
        finally:
            await channel.close(None)
            for worker in cluster.workers:
                await worker.kill()


def request(**fields: Any) -> pb.GenerateRequest:
    prompt = {} if "token_ids" in fields else {"text": SECRET}
    return pb.GenerateRequest(**{**prompt, **fields})


async def read(call: Any, count: int) -> list[int]:
    """Ids of the next `count` tokens, or more where they come together."""
    ids: list[int] = []
    while len(ids) < count:
        chunk = await soon(call.read())
        assert chunk is not EOF, f"the stream ended after {ids}"
        assert chunk.first_index == (ids[0] if ids else chunk.first_index) + len(ids)
        ids += [token.id for token in chunk.tokens]
    return ids


async def read_all(call: Any) -> tuple[list[int], str, pb.Finished]:
    """Ids, text and end of a whole good answer."""
    chunks = []
    while (chunk := await soon(call.read())) is not EOF:
        chunks.append(chunk)
    assert [bool(chunk.request_id) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.HasField("finished") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    ids = [token.id for chunk in chunks for token in chunk.tokens]
    return ids, "".join(chunk.text for chunk in chunks), chunks[-1].finished


class Ended:
    """The error that a call ended with."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        trailers: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        self.can_retry = False
        self.violations: list[str] = []
        bad = error_details_pb2.BadRequest()
        for detail in status.details:
            detail.Unpack(info)
            self.can_retry |= detail.Unpack(retry)
            if detail.Unpack(bad):
                self.violations = [violation.field for violation in bad.field_violations]
        self.code = error.code()
        self.reason = info.reason
        self.metadata = dict(info.metadata)
        self.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        self.message = error.details() or ""
        assert SECRET not in self.message
        assert SECRET not in str(status)


async def failure(call: Any) -> Ended:
    """Read a call to its error."""
    return Ended(await error_of(call))


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    try:
        while await soon(call.read()) is not EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call ended well")


# The good path ------------------------------------------------------------------------------------


async def test_tokens_stream_in_order_and_end_with_usage_and_timeline() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate(max_tokens=3, request_id="mine")
        submit = await soon(worker.submits.get())
        assert submit.attempt == 1
        assert submit.prefill_targets == ()
        assert submit.sampling.max_tokens == 3
        assert submit.sampling.seed > 0
        assert 0 < submit.deadline_s <= PATIENT.request_s
        await worker.say(submit, 0, 1)
        first = await soon(call.read())
        assert (first.request_id, first.first_index, first.text) == ("mine", 0, "0,")
        await worker.say(submit, 1, 2, end=DONE)
        second, last = await soon(call.read()), await soon(call.read())
        assert ([token.id for token in second.tokens], second.request_id) == ([1, 2], "")
        usage, timeline = last.finished.usage, last.finished.timeline
        assert last.finished.reason == types_pb2.FINISH_REASON_LENGTH
        assert (usage.completion_tokens, usage.cached_prompt_tokens) == (3, 3)
        assert usage.prompt_tokens == len(submit.prompt_token_ids)
        assert usage.seed == submit.sampling.seed
        assert 0 < timeline.router_queue_s <= timeline.ttft_s <= timeline.total_s
        assert (timeline.prefill_s, timeline.attempts) == (0.5, 1)
        assert await soon(call.read()) is EOF
        assert worker.cancels.empty()  # it had ended by itself


async def test_complete_gives_the_same_in_one_message() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        sampling = types_pb2.SamplingParams(max_tokens=4, seed=7)
        ids = types_pb2.TokenIds(ids=[5, 6, 7])
        call = cluster.client.Complete(request(token_ids=ids, sampling=sampling))
        submit = await soon(worker.submits.get())
        assert (submit.prompt_token_ids, submit.sampling.seed) == ((5, 6, 7), 7)
        await worker.say(submit, 0, 4, end=DONE)
        reply = await soon(call)
        assert [token.id for token in reply.tokens] == [0, 1, 2, 3]
        assert reply.text == "0,1,2,3,"
        assert reply.finished.usage.seed == 7
        assert reply.request_id


async def test_models_and_cluster_state_are_shown() -> None:
    async with run_cluster() as cluster:
        assert not (await cluster.client.ListModels(pb.ListModelsRequest())).models
        worker = await cluster.worker()
        [model] = (await cluster.client.ListModels(pb.ListModelsRequest())).models
        assert (model.name, model.max_context_tokens, model.vocab_size) == ("demo", 1024, 2048)
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        async with grpc.aio.insecure_channel(cluster.served.internal.address) as channel:
            stub: Any = membership_pb2_grpc.MembershipStub(channel)  # type: ignore[no-untyped-call]
            state = await stub.GetCluster(membership_pb2.GetClusterRequest())
            assert state.num_in_flight == 1
            assert [(w.hello.worker_id, w.num_assigned) for w in state.workers] == [("d0", 1)]
            await worker.say(submit, 0, 8, end=DONE)
            await read_all(call)
            await cluster.assert_nothing_is_held()
            state = await stub.GetCluster(membership_pb2.GetClusterRequest())
            assert (state.num_in_flight, state.num_completed) == (0, 1)
            assert state.workers[0].num_assigned == 0


async def test_prefill_workers_are_named_best_first() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        links = []
        for name in ("p0", "p1"):
            link = await connect_membership(cluster.served.internal.address, PATIENT)
            await link.send(make_hello(name, Role.PREFILL, address=f"127.0.0.1:{name[1]}"))
            await soon(link.receive())
            links.append(link)
        calls = []
        order = []
        for _ in range(2):  # the first prompt is ahead of the second one at p0
            calls.append(cluster.generate())
            submit = await soon(worker.submits.get())
            order.append([target.worker_id for target in submit.prefill_targets])
            await worker.say(submit, 0, 0)
        assert order == [["p0", "p1"], ["p1", "p0"]]
        for call in calls:
            call.cancel()
        for link in links:
            await link.close()
        await until(lambda: not cluster.router.membership.view(0.0).prefill)  # gone at once


# Cancellation, deadlines, duplicates, slow clients ------------------------------------------------


async def test_client_cancel_reaches_the_worker() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        await worker.say(submit, 0, 1)
        await read(call, 1)
        call.cancel()
        cancel = await soon(worker.cancels.get())
        assert (cancel.request_id, cancel.attempt) == (submit.request_id, 1)
        await cluster.assert_nothing_is_held()
        assert cluster.router.in_flight.counts[Outcome.CANCELLED] == 1
        await worker.say(submit, 1, 1)  # late: dropped
        again = cluster.generate()
        await worker.say(await soon(worker.submits.get()), 0, 8, end=DONE)
        assert (await read_all(again))[0] == list(range(8))


async def test_same_request_id_is_refused_while_in_flight_and_never_reused_inside() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate(request_id="same")
        first = await soon(worker.submits.get())
        ended = await failure(cluster.generate(request_id="same"))
        assert (ended.code, ended.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_ID")
        call.cancel()
        await soon(worker.cancels.get())
        await cluster.assert_nothing_is_held()
        call = cluster.generate(request_id="same")
        second = await soon(worker.submits.get())
        assert second.request_id != first.request_id
        await worker.say(first, 0, 8, end=DONE, text="stale")  # of the past life of the label
        await worker.say(second, 0, 8, end=DONE)
        assert (await read_all(call))[1] == "0,1,2,3,4,5,6,7,"


async def test_client_deadline_goes_to_the_worker_and_ends_the_request() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate(timeout=0.6)
        submit = await soon(worker.submits.get())
        assert 0 < submit.deadline_s <= 0.6
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await soon(worker.cancels.get())).request_id == submit.request_id


async def test_request_without_deadline_gets_one_and_learns_what_it_got() -> None:
    async with run_cluster(timers=PATIENT.model_copy(update={"request_s": 0.6})) as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        await worker.say(submit, 0, 2)
        ended = await failure(call)
        assert (ended.code, ended.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE")
        assert ended.metadata["tokens_delivered"] == "2"
        assert (await soon(worker.cancels.get())).request_id == submit.request_id


async def test_client_that_does_not_read_is_ended_and_told() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate(max_tokens=900)
        submit = await soon(worker.submits.get())
        for index in range(900):
            await worker.say(submit, index, 1, text="x" * 50_000)
            if not worker.cancels.empty():
                break
        await soon(worker.cancels.get())
        assert cluster.router.ledger.is_empty
        ended = await failure(call)
        assert (ended.code, ended.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SLOW_CONSUMER",
        )
        assert not ended.can_retry
        assert "256" in ended.message
        assert 0 < int(ended.metadata["tokens_delivered"]) < 900


# Losing workers -----------------------------------------------------------------------------------


async def test_stream_cut_before_the_first_token_moves_the_request() -> None:
    async with run_cluster() as cluster:
        workers = {name: await cluster.worker(name) for name in ("d0", "d1")}
        call = cluster.generate()
        submit = await soon(workers["d0"].submits.get())
        await workers["d0"].cut_stream()
        moved = await soon(workers["d1"].submits.get())
        assert (moved.request_id, moved.attempt) == (submit.request_id, 2)
        assert moved.sampling == submit.sampling
        await workers["d1"].say(moved, 0, 8, end=DONE)
        ids, _, finished = await read_all(call)
        assert ids == list(range(8))
        assert finished.timeline.attempts == 2
        await until(lambda: is_usable(cluster.router, "d0"))  # the link came back


async def test_worker_killed_before_the_first_token_moves_the_request() -> None:
    async with run_cluster() as cluster:
        d0, d1 = await cluster.worker("d0"), await cluster.worker("d1")
        call = cluster.generate()
        await soon(d0.submits.get())
        await d0.kill()
        moved = await soon(d1.submits.get())
        await d1.say(moved, 0, 8, end=DONE)
        assert (await read_all(call))[0] == list(range(8))


async def test_stream_cut_after_tokens_says_how_many_were_delivered() -> None:
    async with run_cluster() as cluster:
        d0, d1 = await cluster.worker("d0"), await cluster.worker("d1")
        call = cluster.generate()
        await d0.say(await soon(d0.submits.get()), 0, 3)
        await read(call, 3)
        await d0.cut_stream()
        ended = await failure(call)
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "STREAM_INTERRUPTED")
        assert ended.metadata["tokens_delivered"] == "3"
        assert d1.submits.empty()


async def test_answer_in_one_message_starts_again_elsewhere_at_any_time() -> None:
    async with run_cluster() as cluster:
        d0, d1 = await cluster.worker("d0"), await cluster.worker("d1")
        sampling = types_pb2.SamplingParams(max_tokens=4)
        call = cluster.client.Complete(request(sampling=sampling))
        submit = await soon(d0.submits.get())
        await d0.say(submit, 0, 3)
        await until(lambda: cluster.router.ledger.assigned(WorkerId("d0")).num_unread_tokens == 0)
        await d0.cut_stream()
        await d1.say(await soon(d1.submits.get()), 0, 4, end=DONE)
        reply = await soon(call)
        assert reply.text == "0,1,2,3,"
        assert reply.finished.timeline.attempts == 2


async def test_last_worker_lost_is_unavailable_with_a_time_to_come_back() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        await soon(worker.submits.get())
        await worker.kill()
        ended = await failure(call)
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert ended.can_retry
        assert ended.retry_after_s > 0


async def test_attempts_are_bounded() -> None:
    async with run_cluster(max_num_attempts=2) as cluster:
        workers = [await cluster.worker(f"d{index}") for index in range(3)]
        call = cluster.generate()
        for attempt, worker in enumerate(workers[:2], 1):
            submit = await soon(worker.submits.get())
            assert submit.attempt == attempt
            await worker.cut_stream()
        assert (await failure(call)).reason == "WORKER_LOST"
        assert workers[2].submits.empty()


async def test_failed_handoff_is_tried_again_without_its_prefill_workers() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        link = await connect_membership(cluster.served.internal.address, PATIENT)
        await link.send(make_hello("p0", Role.PREFILL))
        await soon(link.receive())
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        assert [target.worker_id for target in submit.prefill_targets] == ["p0"]
        await worker.say(submit, 0, 0, end=Failed(reason=Reason.TRANSFER_FAILED, message="no KV"))
        again = await soon(worker.submits.get())
        assert (again.attempt, again.prefill_targets) == (2, ())
        await worker.say(again, 0, 8, end=DONE)
        assert (await read_all(call))[0] == list(range(8))
        await link.close()


async def test_refusal_of_a_worker_reaches_the_client_with_its_retry_time() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        full = Failed(reason=Reason.OVERLOADED, message="the queue is full", retry_after_s=2.5)
        await worker.say(await soon(worker.submits.get()), 0, 0, end=full)
        ended = await failure(call)
        assert (ended.reason, ended.retry_after_s) == ("OVERLOADED", 2.5)


async def test_internal_error_of_a_worker_is_opaque() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        bug = Failed(reason=Reason.INTERNAL, message=f"KeyError: {SECRET}")
        await worker.say(await soon(worker.submits.get()), 0, 0, end=bug)
        ended = await failure(call)
        assert (ended.code, ended.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


async def test_silent_worker_is_given_up_and_its_requests_move() -> None:
    timers = Timers(heartbeat_s=0.1, suspect_s=0.3, dead_s=0.6)
    async with run_cluster(timers=timers) as cluster:
        d0, d1 = await cluster.worker("d0"), await cluster.worker("d1")
        call = cluster.generate()
        await soon(d0.submits.get())
        # d0 says nothing more; d1 does until the request has come to it.
        load, moved = 0, asyncio.create_task(d1.submits.get())
        async with asyncio.timeout(SOON_S):
            while not moved.done():
                load += 1
                await d1.membership.send(make_load(sequence=load))
                await asyncio.wait([moved], timeout=0.05)
        await d1.say(moved.result(), 0, 8, end=DONE)
        assert (await read_all(call))[0] == list(range(8))
        assert not is_usable(cluster.router, "d0")


async def test_new_epoch_of_a_worker_ends_what_the_old_one_had() -> None:
    async with run_cluster() as cluster:
        old, d1 = await cluster.worker("d0", epoch=1), await cluster.worker("d1")
        call = cluster.generate()
        await soon(old.submits.get())
        await cluster.worker("d0", epoch=2)
        moved = await soon(d1.submits.get())
        await d1.say(moved, 0, 8, end=DONE)
        await read_all(call)
        with pytest.raises(WorkerLost):
            await soon(old.membership.receive())


# Bad peers ----------------------------------------------------------------------------------------


async def test_repeated_tokens_are_dropped_and_missing_ones_are_a_fault() -> None:
    async with run_cluster() as cluster:
        d0, d1 = await cluster.worker("d0"), await cluster.worker("d1")
        call = cluster.generate()
        submit = await soon(d0.submits.get())
        await d0.say(submit, 1, 1)  # token 0 is missing
        assert (await soon(d0.cancels.get())).attempt == 1
        moved = await soon(d1.submits.get())
        await d1.say(moved, 0, 2)
        await d1.say(moved, 0, 2)
        await d1.say(moved, 1, 1)
        await d1.say(moved, 2, 6, end=DONE)
        assert (await read_all(call))[0] == list(range(8))


async def test_more_tokens_than_asked_for_never_reach_the_client() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate(max_tokens=4)
        await worker.say(await soon(worker.submits.get()), 0, 5)
        assert (await failure(call)).reason == "WORKER_LOST"
        assert (await soon(worker.cancels.get())).attempt == 1


async def test_outputs_for_unknown_requests_harm_nobody() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        unknown = RequestOutput(request_id=RequestId("nobody"), attempt=1, first_index=0)
        late = RequestOutput(request_id=submit.request_id, attempt=9, first_index=0, end=DONE)
        await worker.say_raw(unknown, late)
        await worker.say(submit, 0, 8, end=DONE)
        assert (await read_all(call))[0] == list(range(8))


@pytest.mark.parametrize("change", [{"protocol_version": 9}, {"tokenizer_hash": b"other"}])
async def test_incompatible_worker_is_turned_away(change: dict[str, Any]) -> None:
    async with run_cluster() as cluster:
        link = await connect_membership(cluster.served.internal.address, PATIENT)
        await link.send(make_hello("d9", **change))
        with pytest.raises(WorkerLost):
            await soon(link.receive())
        await link.close()
        assert cluster.router.membership.served_model("demo") is None


async def test_process_that_answers_in_the_place_of_another_gets_no_requests() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker("d0")
        link = await connect_membership(cluster.served.internal.address, PATIENT)
        await link.send(worker.hello(worker_id=WorkerId("d1")))  # d0 answers at d1's address
        await soon(link.receive())
        call = cluster.generate()
        await worker.say(await soon(worker.submits.get()), 0, 8, end=DONE)
        await read_all(call)
        assert not is_usable(cluster.router, "d1")
        await link.close()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "another"}, "MODEL_NOT_FOUND"),
        ({"text": "x" * 2_000_001}, "INVALID_FIELD"),
        ({"max_tokens": 0}, "INVALID_FIELD"),
    ],
)
async def test_what_no_worker_could_change_is_not_put_off_until_one_comes(
    fields: dict[str, Any], reason: str
) -> None:
    async with run_cluster() as cluster:
        ended = await failure(cluster.generate(**fields))
        assert (ended.reason, ended.can_retry) == (reason, False)


# Bad clients --------------------------------------------------------------------------------------


async def test_no_workers_is_unavailable_at_once() -> None:
    async with run_cluster() as cluster:
        ended = await failure(cluster.generate())
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKERS")
        assert ended.retry_after_s > 0


async def test_bad_requests_name_the_field() -> None:
    async with run_cluster() as cluster:
        await cluster.worker()
        cases: list[tuple[dict[str, Any], str, str]] = [
            ({"text": ""}, "INVALID_FIELD", "text"),
            ({"token_ids": types_pb2.TokenIds(ids=[2048])}, "INVALID_FIELD", "token_ids[0]"),
            ({"token_ids": types_pb2.TokenIds()}, "INVALID_FIELD", "token_ids"),
            ({"model": SECRET}, "MODEL_NOT_FOUND", "model"),
            ({"request_id": f"{SECRET} "}, "INVALID_FIELD", "request_id"),
            ({"max_tokens": 0}, "INVALID_FIELD", "sampling.max_tokens"),
            ({"max_tokens": 1024}, "CONTEXT_TOO_LONG", "sampling.max_tokens"),
            ({"text": f"{SECRET} " * 1000}, "CONTEXT_TOO_LONG", "text"),
        ]
        for fields, reason, field in cases:
            ended = await failure(cluster.generate(**fields))
            assert (ended.reason, ended.violations) == (reason, [field])
            assert not ended.can_retry
        assert cluster.router.in_flight.counts[Outcome.FAILED] == 0


async def test_too_many_in_flight_are_refused_with_a_time_to_come_back() -> None:
    async with run_cluster(max_num_requests=1) as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        ended = await failure(cluster.generate())
        assert (ended.code, ended.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert ended.retry_after_s > 0
        await worker.say(submit, 0, 8, end=DONE)
        await read_all(call)


async def test_more_than_may_wait_are_refused_until_a_first_token_comes() -> None:
    async with run_cluster(max_num_waiting=1) as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        ended = await failure(cluster.generate())
        assert (ended.code, ended.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert "the limit is 1" in ended.message
        assert ended.retry_after_s > 0
        await worker.say(submit, 0, 1)
        await read(call, 1)
        other = cluster.generate()
        await worker.say(await soon(worker.submits.get()), 0, 8, end=DONE)
        await read_all(other)
        await worker.say(submit, 1, 7, end=DONE)
        assert await read(call, 7) == list(range(1, 8))


async def test_predicted_wait_beyond_the_limit_is_refused() -> None:
    async with run_cluster(max_wait_s=0.001) as cluster:  # one prompt ahead takes longer
        worker = await cluster.worker()
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        ended = await failure(cluster.generate())
        assert (ended.code, ended.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert ended.retry_after_s > 0
        await worker.say(submit, 0, 8, end=DONE)
        await read_all(call)


async def test_request_beyond_the_rate_is_refused_and_told_when_to_come_back() -> None:
    async with run_cluster(max_rate=0.5, max_burst=1) as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        await worker.say(await soon(worker.submits.get()), 0, 8, end=DONE)
        await read_all(call)
        ended = await failure(cluster.generate())
        assert (ended.code, ended.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert 0 < ended.retry_after_s <= 2.0


async def test_without_a_burst_ten_seconds_of_the_rate_are_let_in_at_once() -> None:
    async with run_cluster(max_rate=0.2) as cluster:
        worker = await cluster.worker()
        for _ in range(2):
            call = cluster.generate()
            await worker.say(await soon(worker.submits.get()), 0, 8, end=DONE)
            await read_all(call)
        assert (await failure(cluster.generate())).reason == "OVERLOADED"


async def test_attainment_is_counted_by_the_class_that_a_request_names() -> None:
    classes = [
        {"name": "patient", "ttft_s": 60.0, "tpot_s": 60.0},
        {"name": "instant", "ttft_s": 1e-9, "tpot_s": 60.0, "attainment": 0.5},
    ]
    async with run_cluster(slo=classes) as cluster:
        worker = await cluster.worker()
        for name in ("", "patient", "instant"):
            call = cluster.generate(slo_class=name)
            await worker.say(await soon(worker.submits.get()), 0, 8, end=DONE)
            await read_all(call)
        ended = await failure(cluster.generate(slo_class=f"{SECRET} class"))
        assert (ended.reason, ended.violations) == ("INVALID_FIELD", ["slo_class"])
        assert "patient, instant" in ended.message
        async with AdminClient(cluster.served.internal.address) as admin:
            patient, instant = (await admin.cluster_state()).slo
        assert (patient.num_met, patient.num_judged, patient.attainment) == (2, 2, 1.0)
        assert (instant.num_missed_ttft, instant.num_judged, instant.target) == (1, 1, 0.5)


async def test_messages_that_are_not_requests_are_turned_away_and_the_router_goes_on() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        invalid_utf8 = b"\x12\x02\xff\xfe"  # field 2 (text) with bytes that are not UTF-8
        huge = request(text="x" * (5 << 20)).SerializeToString()
        for method, payload, code in (
            ("Generate", invalid_utf8, grpc.StatusCode.INVALID_ARGUMENT),
            ("Generate", b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            ("Complete", invalid_utf8, grpc.StatusCode.INVALID_ARGUMENT),
            ("Generate", huge, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ("Nonsense", b"", grpc.StatusCode.UNIMPLEMENTED),
        ):
            raw: Any = cluster.channel.unary_stream(f"/pdserve.v1.Inference/{method}", bytes, bytes)
            error = await error_of(raw(payload))
            assert error.code() is code, (method, error.details())
            assert "protobuf" not in (error.details() or "")
        call = cluster.generate()
        await worker.say(await soon(worker.submits.get()), 0, 8, end=DONE)
        await read_all(call)


# Draining -----------------------------------------------------------------------------------------


async def test_drain_lets_requests_finish_and_takes_no_new_ones() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        call = cluster.generate()
        submit = await soon(worker.submits.get())
        draining = asyncio.create_task(cluster.served.drain(SOON_S))
        await until(lambda: cluster.router.in_flight.is_draining)
        ended = await failure(cluster.generate())
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert ended.can_retry
        stub: Any = health_pb2_grpc.HealthStub(cluster.channel)
        health = await stub.Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not draining.done()
        await worker.say(submit, 0, 8, end=DONE)
        assert (await read_all(call))[0] == list(range(8))
        await soon(draining)


async def test_requests_that_outlast_the_drain_are_told() -> None:
    async with run_cluster() as cluster:
        worker = await cluster.worker()
        started = cluster.generate()
        await worker.say(await soon(worker.submits.get()), 0, 2)
        await read(started, 2)
        unstarted = cluster.generate()
        await soon(worker.submits.get())
        await cluster.served.drain(0.0)
        assert (await failure(started)).reason == "STREAM_INTERRUPTED"
        assert (await failure(unstarted)).reason == "DRAINING"


async def test_process_says_it_is_ready_and_ends_on_sigterm() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "--settings", "-"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"port": 0, "internal_port": 0}).encode())
        process.stdin.close()
        ready = json.loads(await soon(process.stdout.readline()))
        assert ready["ready"] is True
        assert ready["address"] != ready["internal_address"]
        process.send_signal(signal.SIGTERM)
        assert await soon(process.wait()) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
