"""A model that overflows on one token: whoever asks with it is told so, and nobody else notices."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.domain.errors import PdserveError, Reason
from pdserve.models import DEMO_MODEL_DIR
from tests.support.clusters import TaskCluster, demo_engine, task_cluster

BAD_ID = 1999
GOOD, BAD = tuple(range(20, 60)), (*range(20, 55), BAD_ID, *range(55, 60))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with an embedding that is NaN."""
    path = tmp_path_factory.mktemp("model")
    shutil.copytree(DEMO_MODEL_DIR, path, dirs_exist_ok=True)
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_pretrained(path, dtype=torch.float32)
    untied = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    model.get_output_embeddings().weight = untied
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD_ID] = torch.nan
    model.save_pretrained(path)
    return path


@pytest.fixture
async def cluster(model_dir: Path, prefill: int) -> AsyncIterator[TaskCluster]:
    engine = demo_engine(model=str(model_dir), num_blocks=128)
    async with task_cluster(prefill=prefill, engine=engine) as cluster:
        yield cluster
        await cluster.idle_state()


async def ask(cluster: TaskCluster, prompt: tuple[int, ...], sampling: Sampling) -> list[int]:
    async with InferenceClient(cluster.public_address) as client:
        answer = await client.complete(prompt, sampling, timeout_s=60)
    return [token.token_id for token in answer.tokens]


@pytest.mark.parametrize("prefill", [0, 2])
async def test_unusable_logits_end_their_request_and_no_other_one(cluster: TaskCluster) -> None:
    plain = Sampling(max_tokens=24, ignore_eos=True)
    expected = await ask(cluster, GOOD, plain)
    for options in ({}, {"logprobs": 2}, {"temperature": 0.7}, {"temperature": 1, "top_p": 0.9}):
        others = [asyncio.create_task(ask(cluster, GOOD, plain)) for _ in range(3)]
        sampling = Sampling(max_tokens=8, **options)
        with pytest.raises(PdserveError, match="token 0 are NaN or infinite") as caught:
            await ask(cluster, BAD, sampling)
        assert caught.value.reason is Reason.UNUSABLE_LOGITS
        assert not caught.value.reply.is_retryable
        assert await asyncio.gather(*others) == [expected] * 3
