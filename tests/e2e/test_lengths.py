"""Models that compute requests of some lengths otherwise: each request gets what is its own."""

import asyncio
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from tests.support.clusters import demo_engine, task_cluster
from tests.support.tiny_models import SWITCH, save_tiny_model

NUM_NEW_TOKENS = 12
SEED = 5
Request = tuple[tuple[int, ...], int]


@cache
def requests() -> list[Request]:
    """Prompts of one beginning and their `max_tokens`, on both sides of the switch and across it.

    Short ones follow long ones and the other way round, so that each finds the other's prefix.
    """
    rng = Random(SEED)
    text = tuple(rng.randrange(2, 2000) for _ in range(3 * SWITCH))
    lengths = [3 * SWITCH, 8, SWITCH - 1, 2 * SWITCH, SWITCH, SWITCH + 1, 17, SWITCH - 4]
    asked = [(text[:length], NUM_NEW_TOKENS) for length in lengths]
    # The same within the switch: the last token that is computed is the switch's own.
    return [*asked, *((prompt, SWITCH - len(prompt) + 1) for prompt, _ in asked[1:3])]


def answers_alone(model_dir: Path) -> list[tuple[int, ...]]:
    """Of transformers, which is asked for one at a time."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    answers = []
    for prompt, max_tokens in requests():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        answers.append(tuple(out[0, len(prompt) :].tolist()))
    return answers


async def answer(client: InferenceClient, request: Request) -> tuple[int, ...]:
    prompt, max_tokens = request
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    done = await client.complete(prompt, sampling, timeout_s=60)
    return tuple(token.token_id for token in done.tokens)


@pytest.mark.parametrize("num_prefill", [0, 1])
@pytest.mark.parametrize(
    "name", ["phi3/longrope", "phimoe/longrope", "llama/longrope", "gemma3_text/two-switches"]
)
async def test_each_request_is_computed_by_its_own_length(
    tmp_path: Path, name: str, num_prefill: int
) -> None:
    save_tiny_model(name, tmp_path / "model")
    expected = answers_alone(tmp_path / "model")
    engine = demo_engine(model=str(tmp_path / "model"), block_size=4)
    changes = {"max_step_tokens": 13}
    async with (
        task_cluster(
            prefill=num_prefill, engine=engine, prefill_changes=changes, decode_changes=changes
        ) as cluster,
        InferenceClient(cluster.public_address) as client,
    ):
        # In turn and back again: each finds what the others left in the prefix caches.
        first = [await answer(client, request) for request in requests()]
        second = [await answer(client, request) for request in requests()[::-1]]
        together = await asyncio.gather(
            *(answer(client, request) for request in [*requests(), *requests()])
        )
        await cluster.idle_state()
    assert first == expected, f"seed {SEED}"
    assert second[::-1] == expected, f"seed {SEED}"
    assert together == [*expected, *expected], f"seed {SEED}"
