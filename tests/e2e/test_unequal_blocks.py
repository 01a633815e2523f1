"""Clusters whose prefill and decode workers have blocks of different sizes: exact answers."""

import asyncio
from typing import Any

import pytest

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Answer, Sampling
from tests.support.clusters import demo_engine, task_cluster
from tests.support.prompts import demo_prompts

SEED = 20261129
NUM_PROMPTS = 12
MAX_NUM_ROUNDS = 5  # the router chooses the pairs
SHARED = tuple(300 + index % 700 for index in range(77))  # ends within a block of any size here

Request = tuple[tuple[int, ...], Sampling]


def requests() -> list[Request]:
    """Prompts of all lengths, and some that begin alike and are asked twice."""
    prompts = demo_prompts(NUM_PROMPTS, seed=SEED)
    alone = [(prompt, Sampling(max_tokens=limit)) for prompt, limit in prompts]
    alike = [
        ((*SHARED, *prompt[:40]), Sampling(max_tokens=6, temperature=0.9, seed=place))
        for place, (prompt, _) in enumerate(prompts[:8])
    ]
    return [*alone, *alike, *alike]


async def answers_of(address: str, at_a_time: int) -> list[Answer]:
    async with InferenceClient(address) as client:
        gate = asyncio.Semaphore(at_a_time)

        async def answer(request: Request) -> Answer:
            async with gate:
                return await client.complete(*request, timeout_s=60)

        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(answer(request)) for request in requests()]
        return [task.result() for task in pending]


def token_ids(answer: Answer) -> tuple[int, ...]:
    return tuple(token.token_id for token in answer.tokens)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """What one worker answers that hands nothing on and remembers nothing."""

    async def alone() -> list[tuple[int, ...]]:
        async with task_cluster(prefill=0, engine=demo_engine(prefix_reuse=False)) as cluster:
            return [token_ids(each) for each in await answers_of(cluster.public_address, 1)]

    return asyncio.run(alone())


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [
        (16, 32, "shm"),
        (32, 16, "tcp"),
        *(
            pytest.param(*sizes, transport, marks=pytest.mark.slow)
            for *sizes, transport in [
                (24, 16, "shm"),
                (16, 32, "tcp"),
                (32, 16, "shm"),
                (16, 24, "tcp"),
                (1, 16, "shm"),
                (16, 1, "tcp"),
            ]
        ),
    ],
)
async def test_answers_are_those_of_one_process_whatever_the_sizes_of_blocks(
    prefill: int, decode: int, transport: str, expected: list[tuple[int, ...]]
) -> None:
    def changes(block_size: int) -> dict[str, Any]:
        engine = demo_engine(block_size=block_size, num_blocks=8192 // block_size)
        return {"engine": engine, "transports": (transport,), "max_local_prefill_tokens": 0}

    async with task_cluster(
        prefill_changes=changes(prefill), decode_changes=changes(decode)
    ) as cluster:
        answers = await answers_of(cluster.public_address, 8)
        state = await cluster.idle_state()
    wrong = [place for place, each in enumerate(answers) if token_ids(each) != expected[place]]
    assert not wrong, f"seed {SEED}: requests {wrong} differ"
    handed_on = [each for each in answers if each.finished.timeline.prefill_worker]
    assert len(handed_on) == len(answers)
    assert sum(each.finished.usage.cached_prompt_tokens for each in answers) > 0
    assert sum(worker.load.num_corrupt_blocks for worker in state.workers) == 0


async def test_workers_of_many_sizes_serve_beside_each_other(
    expected: list[tuple[int, ...]],
) -> None:
    engines = [demo_engine(block_size=size) for size in (16, 20)]
    pairs = set()
    async with task_cluster(prefill=2, decode=2, engines=engines) as cluster:
        for _ in range(MAX_NUM_ROUNDS):
            answers = await answers_of(cluster.public_address, 8)
            wrong = [at for at, each in enumerate(answers) if token_ids(each) != expected[at]]
            assert not wrong, f"seed {SEED}: requests {wrong} differ"
            timelines = [each.finished.timeline for each in answers]
            pairs |= {
                (each.prefill_worker, each.decode_worker)
                for each in timelines
                if each.prefill_worker
            }
            if len(pairs) > 2:  # only two are of one size
                break
        await cluster.idle_state()
    assert len(pairs) > 2, pairs
