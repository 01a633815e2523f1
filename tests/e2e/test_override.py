"""A model whose config is overridden answers as transformers does with the same config."""

from random import Random
from typing import Any

import pytest
import torch
import transformers

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.domain.errors import PdserveError
from pdserve.models import DEMO_MODEL_DIR
from tests.support.clusters import demo_engine, task_cluster

CONTEXT = 1024
NUM_NEW_TOKENS = 8
SEED = 11


def answers_alone(prompts: list[tuple[int, ...]], **override: Any) -> list[tuple[int, ...]]:
    config = transformers.AutoConfig.from_pretrained(DEMO_MODEL_DIR, **override)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL_DIR, config=config, dtype=torch.float32
    )
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_NEW_TOKENS,
            min_new_tokens=NUM_NEW_TOKENS,
        )
        answers.append(tuple(out[0, len(prompt) :].tolist()))
    return answers


ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": CONTEXT},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + 0.2 * place for place in range(16)],
        "original_max_position_embeddings": CONTEXT,
    },
}


@pytest.mark.parametrize("kind", ROPES)
async def test_overridden_rope_scaling_gives_the_tokens_of_transformers(kind: str) -> None:
    rng = Random(SEED)
    text = tuple(rng.randrange(2, 2000) for _ in range(CONTEXT + 200))
    prompts = [text[:40], text, text[: CONTEXT - 3], text[:300]]
    override = {"rope_parameters": ROPES[kind], "max_position_embeddings": 2 * CONTEXT}
    rope = {"rope_theta": 10_000.0, **ROPES[kind]}
    expected = answers_alone(prompts, rope_parameters=rope, max_position_embeddings=2 * CONTEXT)
    sampling = Sampling(max_tokens=NUM_NEW_TOKENS, min_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    async with (
        task_cluster(engine=demo_engine(override_config=override)) as cluster,
        InferenceClient(cluster.public_address) as client,
    ):
        answers = [await client.complete(prompt, sampling, timeout_s=60) for prompt in prompts]
        (model,) = await client.list_models()
    assert model.max_context_tokens == 2 * CONTEXT
    tokens = [tuple(token.token_id for token in answer.tokens) for answer in answers]
    assert tokens == expected, f"seed {SEED}"
    assert tokens[1:2] != answers_alone(prompts[1:2]), "the override changes what is computed"


async def test_shortened_context_is_the_limit_of_requests() -> None:
    engine = demo_engine(override_config={"max_context_tokens": 48})
    async with (
        task_cluster(engine=engine) as cluster,
        InferenceClient(cluster.public_address) as client,
    ):
        (model,) = await client.list_models()
        assert model.max_context_tokens == 48
        await client.complete((5,) * 40, Sampling(max_tokens=8), timeout_s=60)
        with pytest.raises(PdserveError, match="the model's context of 48 tokens"):
            await client.complete((5,) * 41, Sampling(max_tokens=8), timeout_s=60)
