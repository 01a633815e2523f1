"""Prefill and decode workers whose ranks divide the model in different ways, as processes.

Their tokens are those of one plain process, whatever divides the two workers.
"""

import asyncio
import itertools
from functools import cache
from random import Random

import pytest

from deploy.local import LocalCluster
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Answer, Sampling
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.messages import ClusterState, WorkerState
from tests.support.clusters import ANY_COEFFICIENTS, demo_engine, task_cluster
from tests.support.prompts import demo_prompts

NUM_PROMPTS = 50
SEED = 20261128
IDLE_S = 10.0

Request = tuple[tuple[int, ...], Sampling]

# (tp, pp) of prefill and of decode
QUICK = ((2, 1), (1, 2))
SLOW = [((2, 1), (2, 1)), ((1, 1), (2, 1)), ((2, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 2), (1, 1))]
TRANSPORTS = ["shm", "tcp", "collective"]


@cache
def requests() -> list[Request]:
    """Each prompt greedily, and with the dice."""
    rng = Random(SEED)
    prompts = demo_prompts(NUM_PROMPTS, seed=SEED)
    greedy = [(prompt, Sampling(max_tokens=limit)) for prompt, limit in prompts]
    sampled = [
        (
            prompt,
            Sampling(
                max_tokens=limit,
                temperature=rng.choice([0.3, 0.8, 1.5]),
                top_k=rng.choice([0, 5, 50]),
                top_p=rng.choice([1.0, 0.95]),
                seed=rng.getrandbits(53),
            ),
        )
        for prompt, limit in prompts
    ]
    return [*greedy, *sampled]


async def answer_all(address: str, at_a_time: int) -> list[Answer]:
    async with InferenceClient(address) as client:
        gate = asyncio.Semaphore(at_a_time)

        async def answer(prompt: tuple[int, ...], sampling: Sampling) -> Answer:
            async with gate:
                return await client.complete(prompt, sampling, timeout_s=120)

        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(answer(*request)) for request in requests()]
        return [task.result() for task in pending]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """What one worker of one rank answers, which hands nothing on."""

    async def alone() -> list[tuple[int, ...]]:
        engine = demo_engine(prefix_reuse=False)
        async with task_cluster(prefill=0, decode=1, engine=engine) as cluster:
            return [token_ids(answer) for answer in await answer_all(cluster.public_address, 1)]

    return asyncio.run(alone())


def token_ids(answer: Answer) -> tuple[int, ...]:
    return tuple(token.token_id for token in answer.tokens)


async def idle_state(cluster: LocalCluster) -> ClusterState:
    """Once every worker has reported, after this call, that it holds no block."""
    async with AdminClient(cluster.internal_address) as admin, asyncio.timeout(IDLE_S):
        before = {each.hello.worker_id: each.load.sequence for each in await workers(admin)}
        while True:
            state = await admin.cluster_state()
            is_fresh = all(
                each.load.sequence >= before[each.hello.worker_id] + 2 for each in state.workers
            )
            if is_fresh and not state.busy_workers and not state.num_in_flight:
                return state
            await asyncio.sleep(0.05)


async def workers(admin: AdminClient) -> tuple[WorkerState, ...]:
    return (await admin.cluster_state()).workers


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [
        (*QUICK, "tcp"),
        *(
            pytest.param(*pair, transport, marks=pytest.mark.slow)
            for pair, transport in itertools.product([QUICK, *SLOW], TRANSPORTS)
            if (pair, transport) != (QUICK, "tcp")
        ),
    ],
)
async def test_tokens_equal_those_of_one_plain_process_however_ranks_divide_the_model(
    prefill: tuple[int, int],
    decode: tuple[int, int],
    transport: str,
    expected: list[tuple[int, ...]],
) -> None:
    settings = ClusterSettings.model_validate(
        {
            "num_blocks": 512,
            "coefficients": ANY_COEFFICIENTS,
            "transports": [transport],
            "router": {"port": 0, "internal_port": 0},
            "prefill": {"replicas": 1, "tp": prefill[0], "pp": prefill[1]},
            "decode": {"replicas": 1, "tp": decode[0], "pp": decode[1]},
        }
    )
    async with LocalCluster.start(settings) as cluster:
        answers = await answer_all(cluster.public_address, 8)
        state = await idle_state(cluster)
    wrong = [place for place, each in enumerate(answers) if token_ids(each) != expected[place]]
    assert not wrong, f"seed {SEED}: requests {wrong} differ"
    handed_off = [each for each in answers if each.finished.timeline.prefill_worker]
    assert len(handed_off) > NUM_PROMPTS
    assert sum(each.finished.usage.cached_prompt_tokens for each in answers) > 0
    assert sum(worker.load.num_corrupt_blocks for worker in state.workers) == 0
