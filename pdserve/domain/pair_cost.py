"""How a pair of workers is judged for a request: the one text of the router and of the simulator.

    total = reading what is ahead and the prompt + handoff + max_tokens * step of the answer's batch

These are plain functions of numbers: `router.policy` calls them as they stand, and
`placement.simulation` compiles them with numba. So they know only what a router knows: the worker's
step coefficients and sizes, as its hello has them, and the account of what was put on it. A prompt
counts as a whole until its first token is there, since a router hears nothing of it before; what a
reader's cache may hold of it is known only to the reader, so that the whole prompt counts.
"""

from typing import Literal

PolicyName = Literal["least_total_time", "least_requests"]
"""What is least of all readers, and of all decode workers: see `router.policy`."""

HANDOFF_S = 0.002
"""What passing KV on adds to TTFT: messages only, since the transfer overlaps the reading."""


def reading_s(
    fixed_s: float,
    token_s: float,
    pair_s: float,
    step_tokens: int,
    num_stages: int,
    num_tokens: int,
    num_pairs: float,
) -> float:
    """Time to read `num_tokens` of prompts in steps of `step_tokens` each, the last one not full.

    Prompts share steps. With `num_stages` stages, as many steps are under way at once.
    """
    num_steps = -(-num_tokens // step_tokens)
    return (fixed_s * num_steps + token_s * num_tokens + pair_s * num_pairs) / num_stages


def answer_step_s(
    fixed_s: float,
    token_s: float,
    context_s: float,
    num_stages: int,
    num_requests: int,
    num_context_tokens: int,
) -> float:
    """Time between two tokens of an answer in a batch; each stage has its part of the batch."""
    num_in_stage = -(-num_requests // num_stages)
    return fixed_s + token_s * num_in_stage + context_s * num_context_tokens / num_stages


def first_token_s(read_s: float, is_handed_over: bool) -> float:
    """Time to the first token, once it is known how long reading takes."""
    return read_s + HANDOFF_S if is_handed_over else read_s


def answer_s(ttft_s: float, max_tokens: float, step_s: float) -> float:
    """Time to the last token of an answer that is as long as it may be."""
    return ttft_s + max_tokens * step_s


def reader_rank(is_late: bool, cost: float) -> tuple[bool, float]:
    """Of readers the least rank is taken; of equals the one with the smallest id.

    One that is late, since what is ahead there takes longer than a request may wait, comes after
    all that are not.
    """
    return (is_late, cost)


def pair_rank(
    is_late: bool, is_full: bool, cost: float, num_free_blocks: int
) -> tuple[bool, bool, float, int]:
    """Of pairs the least rank is taken; of equals the one whose decode side has the smallest id.

    Pairs whose reader is late come last, before them those whose decode side is full, where the
    request would wait for blocks or for a place. Then the least cost counts, then the most blocks
    that are left free.
    """
    return (is_late, is_full, cost, -num_free_blocks)
