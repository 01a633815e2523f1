"""Prefill under DistServe's rules: pipelines fed by one scheduler (MODEL.md 2.2 of the reference).

A batch is formed when stage 0 is free and passes the later stages unchanged, so its last end is
known when it starts. Times in ms. One row of `stages` describes an instance:

    a, b, c        (a + b * tokens + c * sum of squares) / depth + depth, in ms
    depth          pipeline stages
    max_tokens     prompt tokens in one batch
"""

import numpy as np
from numpy.typing import NDArray

from placement.simulation.compiled import compiled, compiled_allocating
from placement.simulation.event_heap import pop, push

OVERHEAD_MS = 2.0
OVERHEAD_MS_PER_TOKEN = 0.0001
NONE = -1


@compiled
def stage_ms(row: NDArray[np.float64], num_tokens: int, num_squares: int) -> float:
    """Time of one stage for a batch; `num_squares` is the sum of squared prompt lengths."""
    depth = row[3]
    return float((row[0] + row[1] * num_tokens + row[2] * num_squares) * (1.0 / depth) + depth)


@compiled_allocating
def run_prefill_pool(
    arrival_ms: NDArray[np.float64],
    prompts: NDArray[np.int64],
    stages: NDArray[np.float64],
    first_ms: NDArray[np.float64],
    instance: NDArray[np.int64],
    busy_ms: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Read every prompt; fills `first_ms` (end of the last stage) and `instance`.

    Returns the requests in the order in which batches were formed, where each batch starts in that
    order (one entry more than batches), and when each batch ended. An arrival at the very moment
    at which a batch ends is queued before the next batch is formed.
    """
    num, num_instances = len(prompts), len(stages)
    order = np.empty(num, np.int64)
    starts = np.zeros(num + 1, np.int64)
    ends = np.empty(num, np.float64)
    following = np.full(num, NONE, np.int64)
    head = np.full(num_instances, NONE, np.int64)
    tail = np.full(num_instances, NONE, np.int64)
    load = np.zeros(num_instances, np.int64)  # in the running batch and in the queue
    is_idle = np.ones(num_instances, np.bool_)
    running = np.zeros(num_instances, np.int64)
    max_depth = 1
    for row in stages:
        max_depth = max(max_depth, int(row[3]))
    free_ms = np.zeros((num_instances, max_depth))
    times = np.empty(num_instances + 1, np.float64)
    sequence = np.empty(num_instances + 1, np.int64)
    items = np.empty(num_instances + 1, np.int64)
    num_events, number, num_ordered, num_batches = 0, 0, 0, 0
    index = 0
    while index < num or num_events > 0:
        if num_events == 0 or (index < num and arrival_ms[index] <= times[0]):
            best = 0
            for candidate in range(1, num_instances):
                if load[candidate] < load[best]:
                    best = candidate
            instance[index] = best
            load[best] += 1
            if head[best] == NONE:
                head[best] = index
            else:
                following[tail[best]] = index
            tail[best] = index
            if is_idle[best]:
                is_idle[best] = False
                num_events = push(
                    times, sequence, items, num_events, arrival_ms[index], number, best
                )
                number += 1
            index += 1
            continue
        now, chosen = times[0], items[0]
        num_events = pop(times, sequence, items, num_events)
        load[chosen] -= running[chosen]
        running[chosen] = 0
        if head[chosen] == NONE:
            is_idle[chosen] = True
            continue
        row = stages[chosen]
        depth, budget = int(row[3]), int(row[4])
        tokens, squares = 0, 0
        starts[num_batches] = num_ordered
        request = head[chosen]
        while request != NONE and prompts[request] <= budget - tokens:
            tokens += prompts[request]
            squares += prompts[request] * prompts[request]
            order[num_ordered] = request
            num_ordered += 1
            running[chosen] += 1
            request = following[request]
        head[chosen] = request
        later = stage_ms(row, tokens, squares)
        step = later + (OVERHEAD_MS + tokens * OVERHEAD_MS_PER_TOKEN)
        end = now + step
        busy_ms[chosen] += step
        num_events = push(times, sequence, items, num_events, end, number, chosen)
        number += 1
        for stage in range(1, depth):
            end = max(end, free_ms[chosen, stage]) + later
            free_ms[chosen, stage] = end
        for position in range(starts[num_batches], num_ordered):
            first_ms[order[position]] = end
        ends[num_batches] = end
        num_batches += 1
    starts[num_batches] = num_ordered
    return order, starts[: num_batches + 1], ends[:num_batches]
