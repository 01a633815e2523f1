"""The cluster's tokens are those of one plain process."""

import asyncio
import itertools
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
import transformers

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Answer, Sampling
from pdserve.models import DEMO_MODEL_DIR
from tests.support.clusters import demo_engine, task_cluster
from tests.support.prompts import demo_prompts

NUM_PROMPTS = 200
SEED = 20261120

# (prefix reuse, chunk tokens, block size, transport, requests at a time)
QUICK = [
    (True, 16, 8, "shm", 16),
    (False, 64, 16, "tcp", 16),
    (True, 1024, 32, "tcp", 1),
]
ALL = [
    *itertools.product([True, False], [16, 64, 1024], [8, 16, 32], ["shm", "tcp"], [1, 16]),
    *itertools.product([True, False], [16, 1024], [16], ["collective"], [16]),
]


@cache
def plain_answers() -> list[tuple[int, ...]]:
    """What `transformers` generates, greedily, one prompt at a time."""
    torch.set_num_threads(1)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL_DIR, dtype=torch.float32
    )
    answers = []
    for prompt, max_tokens in demo_prompts(NUM_PROMPTS, seed=SEED):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens
            )
        answers.append(tuple(out[0, len(prompt) :].tolist()))
    return answers


async def answer_all(
    address: str, requests: Sequence[tuple[tuple[int, ...], Sampling]], at_a_time: int
) -> list[Answer]:
    async with InferenceClient(address) as client:
        gate = asyncio.Semaphore(at_a_time)

        async def answer(prompt: tuple[int, ...], sampling: Sampling) -> Answer:
            async with gate:
                return await client.complete(prompt, sampling, timeout_s=120)

        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(answer(*request)) for request in requests]
        return [task.result() for task in pending]


def token_ids(answer: Answer) -> tuple[int, ...]:
    return tuple(token.token_id for token in answer.tokens)


@pytest.mark.parametrize(
    ("reuse", "chunk", "block_size", "transport", "at_a_time"),
    [
        pytest.param(*each, marks=[] if each in QUICK else [pytest.mark.slow])
        for each in dict.fromkeys([*QUICK, *ALL])
    ],
)
async def test_greedy_tokens_equal_those_of_transformers(
    reuse: bool, chunk: int, block_size: int, transport: str, at_a_time: int
) -> None:
    expected = plain_answers()
    prompts = demo_prompts(NUM_PROMPTS, seed=SEED)
    requests = [(prompt, Sampling(max_tokens=limit)) for prompt, limit in prompts]
    engine = demo_engine(block_size=block_size, prefix_reuse=reuse, num_blocks=16384 // block_size)
    changes = {"max_step_tokens": chunk, "transports": (transport,)}
    async with task_cluster(
        prefill=2, decode=2, engine=engine, prefill_changes=changes, decode_changes=changes
    ) as cluster:
        answers = await answer_all(cluster.public_address, requests, at_a_time)
        state = await cluster.idle_state()
    wrong = [index for index, answer in enumerate(answers) if token_ids(answer) != expected[index]]
    assert not wrong, f"seed {SEED}: prompts {wrong} differ"
    handed_off = [answer for answer in answers if answer.finished.timeline.prefill_worker]
    assert len(handed_off) > NUM_PROMPTS / 2
    assert sum(worker.load.transferred_bytes for worker in state.workers) > 0
    cached = sum(answer.finished.usage.cached_prompt_tokens for answer in answers)
    assert (cached > 0) is reuse


def sampled_requests(count: int) -> list[tuple[tuple[int, ...], Sampling]]:
    rng = Random(SEED)
    return [
        (
            prompt,
            Sampling(
                max_tokens=max_tokens,
                temperature=rng.choice([0.3, 0.8, 1.0, 1.5]),
                top_k=rng.choice([0, 0, 5, 50]),
                top_p=rng.choice([1.0, 0.95, 0.5]),
                seed=rng.getrandbits(53),
            ),
        )
        for prompt, max_tokens in demo_prompts(count, seed=SEED + 1)
    ]


async def test_seeded_sampling_equals_the_colocated_run_whatever_else_is_in_the_batch() -> None:
    requests = sampled_requests(60)
    async with task_cluster(prefill=0, decode=1) as colocated:
        alone = await answer_all(colocated.public_address, requests, 1)
    shuffled = list(enumerate(requests))
    Random(SEED).shuffle(shuffled)
    async with task_cluster(prefill=2, decode=1) as cluster:
        mixed = await answer_all(cluster.public_address, [each for _, each in shuffled], 24)
    for (index, _), answer in zip(shuffled, mixed, strict=True):
        assert token_ids(answer) == token_ids(alone[index]), f"seed {SEED}: request {index}"
        assert answer.text == alone[index].text
    assert len({token_ids(answer) for answer in alone}) > 50  # seeds do matter
