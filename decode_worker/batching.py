"""What the next step computes: a token for every answer, and chunks of prompts read here."""

from collections.abc import Sequence

from decode_worker.requests import DecodeRequest
from pdserve.engine.contract import SampleStep, SequenceStep


def plan_step(
    running: Sequence[DecodeRequest], max_step_tokens: int
) -> list[tuple[DecodeRequest, int]]:
    """All single tokens first, so that reading a prompt delays no answer more than the budget."""
    plan: list[tuple[DecodeRequest, int]] = []
    prompts: list[tuple[DecodeRequest, int]] = []
    for request in running:
        num_left = len(request.token_ids) - request.num_computed_tokens
        (plan if num_left == 1 else prompts).append((request, num_left))
    budget = max(1, max_step_tokens - len(plan))
    for request, num_left in prompts:
        if budget == 0:
            break
        num_tokens = min(num_left, budget)
        plan.append((request, num_tokens))
        budget -= num_tokens
    return plan


def sequence_step(request: DecodeRequest, num_tokens: int) -> SequenceStep:
    """The engine's view: what is next for this request; its last token samples one more."""
    assert request.table is not None
    first, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
    sample = None
    if end == len(request.token_ids):
        sample = SampleStep(params=request.submit.sampling, token_index=request.num_output_tokens)
    return SequenceStep(
        token_ids=tuple(request.token_ids[first:end]),
        start=first,
        block_table=request.table.block_ids,
        sample=sample,
        num_tokens=len(request.token_ids),
    )
