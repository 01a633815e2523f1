"""KV between nodes: what a design hands over, and whether nodes and their links carry it.

The simulator knows each worker's own link; what the workers of a node send together is bounded
here and, for the best of a search, placed by `placement.assign`.
"""

import math
from collections.abc import Sequence

import numpy as np

from placement.assign import Unplaceable, assign, link_room
from placement.search.designs import Design
from placement.search.enumerate import Fleet
from placement.search.evaluate import Evaluator
from placement.simulation.values import PoolRole

RATE_ROOM = 1.05  # a search's rate is of few traces: the certified one may be higher


def kv_bytes_per_request(design: Design, mean_prompt_tokens: float) -> float:
    """Of a request that one worker reads and another decodes."""
    per_token = [worker.pool.kv_bytes_per_token for worker, _ in design.side(PoolRole.PREFILL)]
    return mean_prompt_tokens * max(per_token, default=0.0)


def link_rate(design: Design, fleets: Sequence[Fleet], mean_prompt_tokens: float) -> float:
    """Requests/s that no placement can exceed: what one GPU type reads more than it decodes must
    cross its nodes' links, if all of them are used. Infinite where workers colocate."""
    num_bytes = kv_bytes_per_request(design, mean_prompt_tokens)
    if design.kind != "disaggregated" or num_bytes == 0.0:
        return math.inf
    share = {fleet.gpu: 0.0 for fleet in fleets}
    for role, sign in ((PoolRole.PREFILL, 1.0), (PoolRole.DECODE, -1.0)):
        side = design.side(role)
        total = sum(worker.num_gpus * count for worker, count in side)
        for worker, count in side:
            share[worker.gpu] += sign * worker.num_gpus * count / total
    return min(
        (
            fleet.nodes * link_room(fleet) / (abs(share[fleet.gpu]) * num_bytes)
            for fleet in fleets
            if abs(share[fleet.gpu]) > 1e-9
        ),
        default=math.inf,
    )


def kv_bytes_per_s(evaluator: Evaluator, design: Design, rate: float) -> float:
    """What prefill hands to decode workers at a rate; of mixed designs the share that one
    simulated trace hands over."""
    prompts, _ = evaluator.traffic.sample()
    found = rate * kv_bytes_per_request(design, float(prompts.mean()))
    if design.kind != "mixed" or found == 0.0:
        return found
    done = evaluator.run(design, rate, 0, evaluator.search_horizon_s(rate))
    if done is None:
        return found
    times = done[0]
    return found * float(np.mean((times.prefill != times.decode) & (times.decode >= 0)))


def is_placeable(
    evaluator: Evaluator, design: Design, fleets: Sequence[Fleet], rate: float
) -> bool:
    """Whether nodes and links hold a design that fits by its GPUs."""
    if len(fleets) == 1 and fleets[0].nodes == 1:
        return True
    kv = kv_bytes_per_s(evaluator, design, rate * RATE_ROOM)
    if _links_always_suffice(design, fleets, kv):
        return True
    return not isinstance(assign(design, fleets, kv), Unplaceable)


def _links_always_suffice(design: Design, fleets: Sequence[Fleet], kv: float) -> bool:
    """Whether even a node full of one role is within its links: any packing will do."""
    sides = [design.side(role) for role in (PoolRole.PREFILL, PoolRole.DECODE)]
    gpus = [sum(worker.num_gpus * count for worker, count in side) for side in sides]
    least = min((number for number in gpus if number), default=0)
    if kv == 0.0 or least == 0:
        return True
    return all(fleet.gpus_per_node * kv / least <= link_room(fleet) for fleet in fleets)
