"""Whatever clients do, no block stays behind and the blocks always add up."""

import asyncio
import contextlib
from random import Random

import pytest

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.config.processes import EngineSettings
from pdserve.domain.errors import PdserveError
from pdserve.domain.latency import StepCoefficients
from tests.support.clusters import TaskCluster, demo_engine, task_cluster, timed_engine
from tests.support.prompts import demo_prompts

NUM_REQUESTS = 1000
SEED = 41


def slow_steps(fixed_s: float) -> StepCoefficients:
    return StepCoefficients(
        fixed_s=fixed_s,
        prefill_token_s=1e-5,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    )


async def one_request(
    client: InferenceClient,
    prompt: tuple[int, ...],
    max_tokens: int,
    cancel_after_s: float | None,
    cancel_after_tokens: int | None,
) -> int:
    """Tokens that came until the end, or until the client gave up at the given moment."""
    num_tokens = 0
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(cancel_after_s),
            contextlib.aclosing(client.generate(prompt, sampling, timeout_s=120)) as chunks,
        ):
            async for chunk in chunks:
                num_tokens += len(chunk.tokens)
                if cancel_after_tokens is not None and num_tokens >= cancel_after_tokens:
                    break
    return num_tokens


async def watch_blocks(cluster: TaskCluster, seen: list[int]) -> None:
    """Look at every worker again and again; a state that does not add up cannot be built."""
    while True:
        state = await cluster.state()
        for worker in state.workers:
            kv = worker.load.kv
            assert kv.free + kv.reserved + kv.held + kv.pinned == kv.total
            seen.append(kv.total - kv.free)
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(timed_engine(slow_steps(5e-3), num_blocks=256), id="timed"),
        pytest.param(demo_engine(num_blocks=256), id="torch"),
    ],
)
async def test_thousand_requests_a_third_cancelled_leave_no_block(engine: EngineSettings) -> None:
    rng = Random(SEED)
    prompts = demo_prompts(NUM_REQUESTS, seed=SEED, max_context_tokens=256, max_new_tokens=12)
    in_use: list[int] = []
    async with task_cluster(prefill=2, decode=2, engine=engine) as cluster:
        watcher = asyncio.create_task(watch_blocks(cluster, in_use))
        gate = asyncio.Semaphore(48)

        async def run(index: int, client: InferenceClient) -> tuple[int, int, bool]:
            prompt, max_tokens = prompts[index]
            # A sixth at a random time, so in any phase; a sixth at a random token.
            after_s = rng.uniform(0, 0.5) if index % 6 == 0 else None
            after_tokens = rng.randint(1, max_tokens) if index % 6 == 3 else None
            async with gate:
                got = await one_request(client, prompt, max_tokens, after_s, after_tokens)
            return got, max_tokens, index % 3 == 0

        async with InferenceClient(cluster.public_address) as client, asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(run(index, client)) for index in range(NUM_REQUESTS)]
        state = await cluster.idle_state()
        watcher.cancel()
        await asyncio.wait([watcher])
    results = [task.result() for task in pending]
    assert all(got == wanted for got, wanted, is_cancelled in results if not is_cancelled)
    num_cut = sum(got < wanted for got, wanted, is_cancelled in results if is_cancelled)
    assert num_cut > 50, f"seed {SEED}: hardly a cancel came in time"
    assert state.num_cancelled > 50
    assert state.num_failed == 0
    # A call cancelled at once may never have reached the router.
    assert NUM_REQUESTS * 2 // 3 <= state.num_completed <= NUM_REQUESTS - state.num_cancelled
    for worker in state.workers:
        kv = worker.load.kv
        assert (kv.reserved, kv.held, kv.pinned) == (0, 0, 0), worker.hello.worker_id
    assert max(in_use) > 0
    assert watcher.cancelled()


async def test_deadline_ends_the_request_everywhere() -> None:
    engine = timed_engine(slow_steps(0.05))
    async with (
        task_cluster(engine=engine) as cluster,
        InferenceClient(cluster.public_address) as client,
    ):
        with pytest.raises(PdserveError) as caught:
            await client.complete((1, 2, 3), Sampling(max_tokens=200), timeout_s=0.5)
        assert caught.value.reply.grpc == "DEADLINE_EXCEEDED"
        await cluster.idle_state()
