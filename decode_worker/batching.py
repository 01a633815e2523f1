"""What the next step computes: a token for every answer, and chunks of prompts read here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from decode_worker.requests import DecodeRequest
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch

Plan = list[tuple[DecodeRequest, int]]


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a step under way does for a request: so much more is computed once it is over."""

    num_tokens: int  # that it computes
    place: int | None  # of the token that it draws, among all that it draws; None: it draws none

    @property
    def num_drawn(self) -> int:
        return 0 if self.place is None else 1


NOTHING = Awaited(0, None)


def awaited_of(plan: Plan, batch: StepBatch) -> Mapping[DecodeRequest, Awaited]:
    """What the step of `batch` does, which was made of `plan`."""
    awaited, num_drawn = {}, 0
    for (request, count), sequence in zip(plan, batch.sequences, strict=True):
        draws = sequence.sample is not None
        awaited[request] = Awaited(count, num_drawn if draws else None)
        num_drawn += draws
    return awaited


def plan_step(
    running: Sequence[DecodeRequest],
    max_step_tokens: int,
    awaited: Mapping[DecodeRequest, Awaited] | None = None,
) -> Plan:
    """All single tokens first, so that reading a prompt delays no answer more than the budget.

    The step comes after the one that is `awaited`. A request whose last possible token that one
    draws is not in it.
    """
    plan: Plan = []
    prompts: Plan = []
    for request in running:
        num_left = len(request.token_ids) - request.num_computed_tokens
        if awaited and (before := awaited.get(request)):
            num_left += before.num_drawn - before.num_tokens
            if before.num_drawn and request.num_left_tokens == 1:
                continue
        (plan if num_left == 1 else prompts).append((request, num_left))
    budget = max(1, max_step_tokens - len(plan))
    for request, num_left in prompts:
        if budget == 0:
            break
        num_tokens = min(num_left, budget)
        plan.append((request, num_tokens))
        budget -= num_tokens
    return plan


def sequence_step(
    request: DecodeRequest, num_tokens: int, before: Awaited = NOTHING
) -> SequenceStep:
    """The engine's view: what is next for this request; its last token samples one more.

    `before`: what the step under way does for it.
    """
    assert request.table is not None
    first = request.num_computed_tokens + before.num_tokens
    end, num_known = first + num_tokens, len(request.token_ids) + before.num_drawn
    sample = None
    if end == num_known:
        index = request.num_output_tokens + before.num_drawn
        sample = SampleStep(params=request.submit.sampling, token_index=index)
    return SequenceStep(
        token_ids=tuple(request.token_ids[first:end]) if before.place is None else (0,),
        start=first,
        block_table=request.table.block_ids,
        sample=sample,
        num_tokens=num_known,
        follows=before.place,
    )
