"""What a step holds."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from decode_worker.batching import plan_step, sequence_step
from pdserve.domain.sampling import SamplingParams


def request(num_computed: int, num_left: int, num_output: int = 0) -> Any:
    return SimpleNamespace(
        token_ids=list(range(num_computed + num_left)),
        num_computed_tokens=num_computed,
        num_output_tokens=num_output,
        table=SimpleNamespace(block_ids=(4, 2)),
        submit=SimpleNamespace(sampling=SamplingParams()),
    )


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=8),
    max_step_tokens=st.integers(1, 24),
)
def test_every_answer_gets_its_token_and_prompts_share_what_is_left(
    sizes: list[tuple[int, int]], max_step_tokens: int
) -> None:
    running = [request(*size) for size in sizes]
    plan = plan_step(running, max_step_tokens)
    answers = [each for each in running if len(each.token_ids) - each.num_computed_tokens == 1]
    assert [each for each, _ in plan[: len(answers)]] == answers
    prompt_counts = [count for each, count in plan if each not in answers]
    assert all(count >= 1 for _, count in plan)
    assert sum(prompt_counts) <= max(1, max_step_tokens - len(answers))
    for each, count in plan:
        assert count <= len(each.token_ids) - each.num_computed_tokens
    if running:
        assert plan, "somebody always moves on"


def test_only_the_step_that_reaches_the_end_samples() -> None:
    middle = sequence_step(request(4, 6), 5)
    assert (middle.token_ids, middle.start, middle.sample) == ((4, 5, 6, 7, 8), 4, None)
    end = sequence_step(request(4, 6, num_output=2), 6)
    assert end.sample is not None
    assert end.sample.token_index == 2
    assert end.block_table == (4, 2)
