"""Chunks of prompts within a budget."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.sampling import SamplingParams
from prefill_worker.batching import chunk_step, plan_chunks


def request(num_computed: int, num_left: int) -> Any:
    return SimpleNamespace(
        num_computed_tokens=num_computed,
        num_tokens=num_computed + num_left,
        num_tokens_left=num_left,
        table=SimpleNamespace(block_ids=(3, 1)),
        start=SimpleNamespace(
            prompt_token_ids=tuple(range(num_computed + num_left)), sampling=SamplingParams()
        ),
    )


@given(
    lefts=st.lists(st.integers(0, 30), max_size=8),
    max_step_tokens=st.integers(1, 40),
)
def test_budget_is_filled_in_order_and_only_the_last_prompt_is_cut(
    lefts: list[int], max_step_tokens: int
) -> None:
    plan = plan_chunks([request(4, left) for left in lefts], max_step_tokens)
    counts = [count for _, count in plan]
    assert sum(counts) == min(max_step_tokens, sum(lefts))
    assert all(count == each.num_tokens_left for each, count in plan[:-1])
    assert all(count >= 1 for count in counts)


def test_only_the_last_chunk_samples_the_first_token() -> None:
    assert chunk_step(request(4, 6), 5).sample is None
    last = chunk_step(request(4, 6), 6)
    assert (last.token_ids, last.start) == ((4, 5, 6, 7, 8, 9), 4)
    assert last.sample is not None
    assert last.sample.token_index == 0
