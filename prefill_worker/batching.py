"""What the next step computes: chunks of prompts within a budget of tokens."""

from collections.abc import Sequence

from pdserve.engine.contract import SampleStep, SequenceStep
from prefill_worker.queue import PrefillRequest


def plan_chunks(
    active: Sequence[PrefillRequest], max_step_tokens: int
) -> list[tuple[PrefillRequest, int]]:
    """Fill the budget in the order given: whole rests of prompts, the last one maybe cut."""
    plan: list[tuple[PrefillRequest, int]] = []
    budget = max_step_tokens
    for request in active:
        num_tokens = min(budget, request.num_tokens_left)
        if num_tokens == 0:
            continue
        plan.append((request, num_tokens))
        budget -= num_tokens
    return plan


def chunk_step(request: PrefillRequest, num_tokens: int) -> SequenceStep:
    """The engine's view of one chunk; the prompt's last chunk samples the first token."""
    assert request.table is not None
    first, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
    is_last = end == request.num_tokens
    return SequenceStep(
        token_ids=request.start.prompt_token_ids[first:end],
        start=first,
        block_table=request.table.block_ids,
        sample=SampleStep(params=request.start.sampling, token_index=0) if is_last else None,
        num_tokens=request.num_tokens,
    )
