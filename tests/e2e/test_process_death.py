"""A process of a running cluster is killed: every request still ends, soon and clearly."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator

import pytest

from deploy.local import LocalCluster
from pdserve.client.admin import AdminClient
from pdserve.client.faults import ClusterUnreachable
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Chunk, Sampling
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.errors import PdserveError, Reason
from pdserve.domain.messages import Role
from tests.support.waiting import wait_until

CLEAR_WITHIN_S = 3.0
SLOW = {"fixed_s": 0.02, "prefill_token_s": 0.01, "decode_token_s": 0.001}
PROMPT = tuple(range(20, 120))  # takes a second to read
LONG_ANSWER = Sampling(max_tokens=400, ignore_eos=True)  # takes eight seconds to write


def settings(*, num_prefill: int, num_decode: int) -> ClusterSettings:
    return ClusterSettings.model_validate(
        {
            "engine": "timed",
            "coefficients": SLOW,
            "router": {"port": 0, "internal_port": 0},
            "prefill": {"replicas": num_prefill},
            "decode": {"replicas": num_decode},
        }
    )


@contextlib.asynccontextmanager
async def running(
    *, num_prefill: int = 1, num_decode: int = 1
) -> AsyncIterator[tuple[LocalCluster, InferenceClient]]:
    chosen = settings(num_prefill=num_prefill, num_decode=num_decode)
    async with LocalCluster.start(chosen) as cluster:
        async with InferenceClient(cluster.public_address) as client:
            yield cluster, client
        cluster.kill()  # the drain has its own tests


async def read_until_end(client: InferenceClient, chunks: list[Chunk], sampling: Sampling) -> None:
    async for chunk in client.generate(PROMPT, sampling, timeout_s=60):
        chunks.append(chunk)


def num_tokens(chunks: list[Chunk]) -> int:
    return sum(len(chunk.tokens) for chunk in chunks)


@pytest.mark.parametrize("victim", ["router", "decode-0"])
async def test_death_without_a_spare_ends_the_stream_with_a_clear_status(victim: str) -> None:
    async with running() as (cluster, client):
        chunks: list[Chunk] = []
        request = asyncio.create_task(read_until_end(client, chunks, LONG_ANSWER))
        await wait_until(lambda: num_tokens(chunks) > 3, within_s=20, what="tokens come")
        cluster.process(victim).signal(signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(PdserveError) as caught:
            async with asyncio.timeout(20):
                await request
        elapsed_s = time.monotonic() - killed
    assert elapsed_s < CLEAR_WITHIN_S
    if victim == "router":
        assert isinstance(caught.value, ClusterUnreachable)
    else:
        assert caught.value.reason in (
            Reason.WORKER_LOST,
            Reason.NO_WORKERS,
            Reason.STREAM_INTERRUPTED,
        )


async def test_death_of_the_only_prefill_worker_while_it_reads_does_not_hang_the_request() -> None:
    async with running() as (cluster, client):
        chunks: list[Chunk] = []
        short = Sampling(max_tokens=4, ignore_eos=True)
        request = asyncio.create_task(read_until_end(client, chunks, short))
        started = time.monotonic()
        await wait_until(  # half of the second that reading takes
            lambda: time.monotonic() - started > 0.5, within_s=5, what="the prompt is being read"
        )
        assert not chunks
        cluster.process("prefill-0").signal(signal.SIGKILL)
        killed = time.monotonic()
        with contextlib.suppress(PdserveError):
            async with asyncio.timeout(20):
                await request
        # The decode worker may read the prompt itself, which takes the second once more.
        assert time.monotonic() - killed < CLEAR_WITHIN_S + 1.5
        assert not chunks or chunks[-1].finished is not None


async def test_next_request_is_served_after_the_prefill_worker_died() -> None:
    async with running() as (cluster, client):
        cluster.process("prefill-0").signal(signal.SIGKILL)
        await cluster.next_event()
        answer = await client.complete(
            PROMPT[:5], Sampling(max_tokens=3, ignore_eos=True), timeout_s=10
        )
        assert len(answer.tokens) == 3
        assert answer.finished.timeline.prefill_worker == ""


async def test_death_of_the_writing_worker_never_changes_a_token() -> None:
    sampling = Sampling(max_tokens=60, ignore_eos=True, temperature=0.9, seed=5)
    async with running(num_decode=2) as (cluster, client):
        expected = await client.complete(PROMPT, sampling, timeout_s=30)
        chunks: list[Chunk] = []
        request = asyncio.create_task(read_until_end(client, chunks, sampling))
        await wait_until(lambda: num_tokens(chunks) > 10, within_s=20, what="tokens come")
        cluster.process(await writing_worker(cluster)).signal(signal.SIGKILL)
        killed, failure = time.monotonic(), None
        try:
            async with asyncio.timeout(20):
                await request
        except PdserveError as error:
            failure = error
    assert time.monotonic() - killed < CLEAR_WITHIN_S + 2  # reading it again takes a second
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    if failure is None:
        assert tokens == expected.tokens
    else:
        assert failure.reason is Reason.STREAM_INTERRUPTED
        assert tokens == expected.tokens[: len(tokens)]
        assert f"{len(tokens)} tokens" in failure.message


async def writing_worker(cluster: LocalCluster) -> str:
    """The decode worker that has the only request."""
    async with AdminClient(cluster.internal_address) as admin:
        state = await admin.cluster_state()
    (writer,) = [
        worker.hello.worker_id
        for worker in state.workers
        if worker.hello.role is Role.DECODE and worker.num_assigned
    ]
    return writer
