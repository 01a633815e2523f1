"""Colocated instances without a pipeline under DistServe's rules ("vllm" in the reference).

A prompt that waits is read before any decode step; a batch is either prompts or decode steps.
"""

import numpy as np
from numpy.typing import NDArray

from placement.simulation.compiled import compiled, compiled_allocating, inlined
from placement.simulation.distserve_decode import (
    ACTIVE,
    BOUNDARY,
    BUSY,
    CONTEXT,
    NEVER,
    NEXT,
    OUTPUT,
    PROMPT,
    DecodeState,
    admit,
    enqueue,
    settle,
    start_steps,
)
from placement.simulation.distserve_prefill import (
    NONE,
    OVERHEAD_MS,
    OVERHEAD_MS_PER_TOKEN,
    stage_ms,
)

MAX_DECODE_QUEUE_TOKENS = 9_000_000
"""Above it the reference decodes before it reads on."""


# Columns of `queues`: prompts that wait, and those that are being read.
HEAD, TAIL, WAITING, BATCH, READING = 0, 1, 2, 3, 4


@inlined
def _start_prefill(
    state: DecodeState, row: NDArray[np.float64], queue: NDArray[np.int64], instance: int
) -> None:
    requests = state.requests
    budget = int(row[4])
    tokens, squares, count, last = 0, 0, 0, NONE
    request = queue[HEAD]
    queue[BATCH] = request
    while request != NONE and requests[request, PROMPT] <= budget - tokens:
        tokens += requests[request, PROMPT]
        squares += requests[request, PROMPT] * requests[request, PROMPT]
        count += 1
        last = request
        request = requests[request, NEXT]
    queue[HEAD] = request
    requests[last, NEXT] = NONE
    queue[WAITING] -= count
    queue[READING] = count
    duration = stage_ms(row, tokens, squares) + (OVERHEAD_MS + tokens * OVERHEAD_MS_PER_TOKEN)
    state.clocks[instance, BUSY] += duration
    state.clocks[instance, BOUNDARY] += duration


@compiled
def _advance(
    state: DecodeState,
    stages: NDArray[np.float64],
    queues: NDArray[np.int64],
    first_ms: NDArray[np.float64],
    instance: int,
    limit_ms: float,
) -> None:
    queue, requests, count = queues[instance], state.requests, state.counts[instance]
    while state.clocks[instance, BOUNDARY] < limit_ms:
        now = state.clocks[instance, BOUNDARY]
        if queue[READING] > 0:
            request = queue[BATCH]
            while request != NONE:
                following = requests[request, NEXT]
                first_ms[request] = now
                if requests[request, OUTPUT] == 0:
                    state.last_ms[request] = now
                else:
                    enqueue(requests, count, request)
                request = following
            queue[READING] = 0
        elif count[ACTIVE] > 0:
            settle(state, instance)
        admit(state, instance, False)
        if queue[WAITING] > 0 and count[CONTEXT] <= MAX_DECODE_QUEUE_TOKENS:
            _start_prefill(state, stages[instance], queue, instance)
        else:
            start_steps(state, instance, now if queue[WAITING] > 0 else limit_ms)


@compiled_allocating
def run_colocated_pool(
    arrival_ms: NDArray[np.float64],
    stages: NDArray[np.float64],
    state: DecodeState,
    first_ms: NDArray[np.float64],
    instance: NDArray[np.int64],
) -> None:
    """Serve every request; fills `first_ms`, `state.last_ms` and `instance`."""
    num, num_instances = len(arrival_ms), len(stages)
    queues = np.zeros((num_instances, 5), np.int64)
    queues[:, HEAD] = NONE
    requests = state.requests
    for index in range(num):
        now = arrival_ms[index]
        best, least = 0, np.int64(-1)
        for candidate in range(num_instances):
            queue = queues[candidate]
            if queue[WAITING] + queue[READING] > 0:
                _advance(state, stages, queues, first_ms, candidate, now)
            load = queue[WAITING] + queue[READING]
            if least < 0 or load < least:
                best, least = candidate, load
            if load == 0:
                break
        _advance(state, stages, queues, first_ms, best, now)
        queue = queues[best]
        instance[index] = best
        requests[index, NEXT] = NONE
        if queue[HEAD] == NONE:
            queue[HEAD] = index
        else:
            requests[queue[TAIL], NEXT] = index
        queue[TAIL] = index
        queue[WAITING] += 1
        if state.clocks[best, BOUNDARY] == NEVER:
            state.clocks[best, BOUNDARY] = now
    for candidate in range(num_instances):
        _advance(state, stages, queues, first_ms, candidate, NEVER)
