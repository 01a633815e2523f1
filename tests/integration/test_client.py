"""The client against a real gRPC server that answers as it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from pdserve.client.admin import AdminClient
from pdserve.client.faults import ClusterUnreachable
from pdserve.client.inference import InferenceClient
from pdserve.client.load import only_model, run_load
from pdserve.client.statistics import Slo, summarise
from pdserve.client.values import Model, Sampling
from pdserve.client.workload import TraceRequest
from pdserve.domain.errors import LocalFault, PdserveError
from pdserve.v1 import inference_pb2, inference_pb2_grpc, types_pb2

Chunks = Callable[[inference_pb2.GenerateRequest], AsyncIterator[inference_pb2.GenerateChunk]]
MODEL = Model(name="demo", max_context_tokens=64, vocab_size=100)


class ToldInference(inference_pb2_grpc.InferenceServicer):
    """Streams what `chunks` makes of a request; remembers requests and which were cancelled."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.cancelled = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.requests.append(request)
        try:
            async for chunk in self.chunks(request):
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = inference_pb2.Model(name="demo", max_context_tokens=64, vocab_size=100)
        return inference_pb2.ListModelsResponse(models=[model])


@contextlib.asynccontextmanager
async def serving(chunks: Chunks) -> AsyncIterator[tuple[str, ToldInference]]:
    server, servicer = grpc.aio.server(), ToldInference(chunks)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        await server.stop(0)


def tokens(*ids: int) -> list[types_pb2.Token]:
    return [types_pb2.Token(id=token_id) for token_id in ids]


def last_chunk(first_index: int, *ids: int) -> inference_pb2.GenerateChunk:
    finished = inference_pb2.Finished(
        reason=types_pb2.FINISH_REASON_LENGTH,
        timeline=types_pb2.PhaseTimeline(prefill_s=0.1, total_s=0.2, prefill_worker="prefill-0"),
    )
    return inference_pb2.GenerateChunk(
        first_index=first_index, tokens=tokens(*ids), finished=finished
    )


async def two_chunks(
    request: inference_pb2.GenerateRequest,
) -> AsyncIterator[inference_pb2.GenerateChunk]:
    yield inference_pb2.GenerateChunk(request_id="r", tokens=tokens(1), text="a")
    yield last_chunk(1, 2, 3)


async def test_stream_ends_with_finished() -> None:
    async with serving(two_chunks) as (address, servicer), InferenceClient(address) as client:
        chunks = [chunk async for chunk in client.generate([5, 6], Sampling(max_tokens=3))]
    assert [token.token_id for chunk in chunks for token in chunk.tokens] == [1, 2, 3]
    assert chunks[-1].finished is not None
    assert servicer.requests[0].token_ids.ids == [5, 6]
    assert servicer.requests[0].sampling.max_tokens == 3


async def test_stream_with_a_gap_is_an_error_not_an_answer() -> None:
    async def with_gap(request: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
        yield inference_pb2.GenerateChunk(tokens=tokens(1))
        yield last_chunk(2, 3)

    async with serving(with_gap) as (address, _), InferenceClient(address) as client:
        with pytest.raises(PdserveError, match="token 1 missing"):
            _ = [chunk async for chunk in client.generate("x")]


async def test_stream_that_just_stops_is_an_error_not_an_answer() -> None:
    async def cut(request: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
        yield inference_pb2.GenerateChunk(tokens=tokens(1))

    async with serving(cut) as (address, _), InferenceClient(address) as client:
        with pytest.raises(PdserveError, match="without its end"):
            _ = [chunk async for chunk in client.generate("x")]


async def test_leaving_the_loop_cancels_the_request() -> None:
    async def endless(request: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
        yield inference_pb2.GenerateChunk(tokens=tokens(1))
        await asyncio.Event().wait()

    async with serving(endless) as (address, servicer), InferenceClient(address) as client:
        async with contextlib.aclosing(client.generate("x")) as stream:
            async for _ in stream:
                break
        async with asyncio.timeout(2):
            await servicer.cancelled.wait()


async def test_deadline_of_the_client_is_reason_deadline() -> None:
    async def silent(request: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
        await asyncio.Event().wait()
        yield inference_pb2.GenerateChunk()

    async with serving(silent) as (address, _), InferenceClient(address) as client:
        with pytest.raises(PdserveError) as caught:
            _ = [chunk async for chunk in client.generate("x", timeout_s=0.1)]
    assert caught.value.reason == "DEADLINE"


async def test_nobody_listening_is_unreachable() -> None:
    async with serving(two_chunks) as (address, _):
        pass
    async with InferenceClient(address) as client:
        with pytest.raises(ClusterUnreachable, match="connection refused"):
            await client.list_models()


async def test_public_port_does_not_serve_operators() -> None:
    async with serving(two_chunks) as (address, _), AdminClient(address) as admin:
        with pytest.raises(LocalFault, match="public port"):
            await admin.cluster_state()


async def test_model_is_chosen_by_name_or_by_being_the_only_one() -> None:
    async with serving(two_chunks) as (address, _), InferenceClient(address) as client:
        assert await only_model(client) == MODEL
        with pytest.raises(LocalFault, match="model other: served are demo"):
            await only_model(client, "other")


async def test_load_leaves_at_its_planned_times_whatever_became_of_earlier_requests() -> None:
    release = asyncio.Event()

    async def held(request: inference_pb2.GenerateRequest) -> AsyncIterator[Any]:
        if len(servicer.requests) == 3:
            release.set()  # the last one has arrived while the first two still wait
        await release.wait()
        yield last_chunk(0, *range(request.sampling.max_tokens))

    planned = [TraceRequest(0.05 * index, 10 + index, 4) for index in range(3)]
    async with serving(held) as (address, servicer), asyncio.timeout(5):
        records, duration_s = await run_load(address, MODEL, planned)
    assert [record.index for record in records] == [0, 1, 2]
    assert [record.prompt_tokens for record in records] == [10, 11, 12]
    assert all(record.is_ok for record in records)
    assert records[0].ttft_s is not None
    assert records[2].ttft_s is not None
    assert records[0].ttft_s >= 0.1  # counted from its planned arrival
    assert records[2].ttft_s < records[0].ttft_s
    assert duration_s >= 0.1
    assert all(request.sampling.ignore_eos for request in servicer.requests)
    report = summarise(records, Slo(), duration_s)
    assert report.num_ok == 3
    assert report.phase_share["prefill_s"] == pytest.approx(0.5)


async def test_load_counts_failures_by_reason() -> None:
    async with serving(two_chunks) as (address, _):
        model = MODEL
        planned = [TraceRequest(0.0, 5, 4)]

        async def gap(request: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
            yield last_chunk(7, 1)

        async with serving(gap) as (broken, _):
            records, _ = await run_load(broken, model, planned)
        assert records[0].failure == "INTERNAL"
        records, _ = await run_load(address, model, planned)
        assert records[0].failure == ""
