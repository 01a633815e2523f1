"""Prompts that one side of a cluster has no room for: served, or refused for good."""

import pytest

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.domain.errors import BadRequest, Reason
from tests.support.clusters import demo_engine, task_cluster

BLOCK_SIZE = 16
SMALL, LARGE = (demo_engine(num_blocks=count, block_size=BLOCK_SIZE) for count in (8, 64))
PROMPT = tuple(300 + index % 700 for index in range(200))  # 13 blocks
SHORT = PROMPT[::-1][:60]
SAMPLING = Sampling(max_tokens=6, ignore_eos=True)


async def test_prompt_that_no_prefill_worker_has_room_for_is_read_where_it_is_answered() -> None:
    async with (
        task_cluster(prefill=0, engine=LARGE) as cluster,
        InferenceClient(cluster.public_address) as client,
    ):
        expected = await client.complete(PROMPT, SAMPLING, timeout_s=60)
    async with task_cluster(prefill=2, engine=LARGE, prefill_changes={"engine": SMALL}) as cluster:
        async with InferenceClient(cluster.public_address) as client:
            answer = await client.complete(PROMPT, SAMPLING, timeout_s=60)
            assert [token.token_id for token in answer.tokens] == [
                token.token_id for token in expected.tokens
            ]
            assert answer.finished.timeline.prefill_worker == ""
            short = await client.complete(SHORT, SAMPLING, timeout_s=60)
            assert short.finished.timeline.prefill_worker.startswith("prefill")
        await cluster.idle_state()


async def test_prompt_that_no_decode_worker_has_room_for_is_refused_before_any_work() -> None:
    async with task_cluster(engine=LARGE, decode_changes={"engine": SMALL}) as cluster:
        async with InferenceClient(cluster.public_address) as client:
            with pytest.raises(BadRequest) as caught:
                await client.complete(PROMPT, SAMPLING, timeout_s=60)
            assert caught.value.reason is Reason.CONTEXT_TOO_LONG
            assert not caught.value.reply.is_retryable
            assert "KV memory of the largest decode worker of 128 tokens" in caught.value.message
            exact = Sampling(max_tokens=128 - len(SHORT) + 1, ignore_eos=True)
            answer = await client.complete(SHORT, exact, timeout_s=60)  # the last needs no KV
            assert len(answer.tokens) == exact.max_tokens
        state = await cluster.idle_state()
        assert (state.num_refused, state.num_completed) == (1, 1)
