"""A flipped byte in a transferred block never becomes text."""

import pytest

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Chunk, Sampling
from pdserve.domain.errors import PdserveError, Reason
from tests.support.clusters import task_cluster
from tests.support.prompts import demo_prompts

PROMPT, _ = demo_prompts(12, seed=5)[9]  # half the context
SAMPLING = Sampling(max_tokens=20, ignore_eos=True)


async def answer(address: str, received: list[Chunk] | None = None) -> list[Chunk]:
    """All chunks; those before a failure are in `received`."""
    received = [] if received is None else received
    async with InferenceClient(address) as client:
        async for chunk in client.generate(PROMPT, SAMPLING, timeout_s=30):
            received.append(chunk)
    return received


def token_ids(chunks: list[Chunk]) -> list[int]:
    return [token.token_id for chunk in chunks for token in chunk.tokens]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_one_corrupt_block_is_fetched_again_and_the_answer_is_right(transport: str) -> None:
    async with task_cluster(prefill=0) as plain:
        expected = token_ids(await answer(plain.public_address))
    changes = {"corrupt_kv_blocks": 1, "transports": (transport,)}
    async with task_cluster(
        decode_changes=changes, prefill_changes={"transports": (transport,)}
    ) as cluster:
        assert token_ids(await answer(cluster.public_address)) == expected
        state = await cluster.idle_state()
    assert sum(worker.load.num_corrupt_blocks for worker in state.workers) == 1


@pytest.mark.parametrize("prefill", [1, 2])
async def test_every_retry_corrupt_is_a_clear_error_and_no_token_is_made_from_it(
    prefill: int,
) -> None:
    async with task_cluster(
        prefill=prefill, decode_changes={"corrupt_kv_blocks": "all"}
    ) as cluster:
        received: list[Chunk] = []
        with pytest.raises(PdserveError) as caught:
            await answer(cluster.public_address, received)
        async with InferenceClient(cluster.public_address) as client:
            with pytest.raises(PdserveError, match="do not match their digests"):
                await client.complete(PROMPT, SAMPLING, timeout_s=30)
        assert caught.value.reason is Reason.KV_INTEGRITY
        assert caught.value.reply.grpc == "DATA_LOSS"
        # The first token is the prefill worker's own, made before anything travelled.
        assert len(token_ids(received)) <= 1
        state = await cluster.idle_state()
    assert (
        sum(worker.load.num_tokens for worker in state.workers if worker.hello.role == "decode")
        == 0
    )
    assert sum(worker.load.num_corrupt_blocks for worker in state.workers) >= 2 * 2 * prefill
