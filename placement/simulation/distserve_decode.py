"""Decode under DistServe's rules on instances without a pipeline: steps skipped in closed form.

A step of B requests that hold K tokens takes

    a + b * (K + B) + c * B + 2 + 0.0001 * K   ms, (a, b, c) by B below or from a threshold,

and adds B to K, so n steps of an unchanged batch are an arithmetic series. A batch changes when a
request ends or joins. As long as everything that waits fits into MAX_NUM_TOKENS the batch is the
whole queue ("flowing"), and requests are kept in a heap by the step at which they end. Else the
queue is kept in order and stepped one by one ("rotating").

An instance is advanced lazily, when a request comes to it. State lies in few arrays with named
columns, since each array that a compiled function is handed costs a reference count.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.simulation.compiled import compiled, inlined
from placement.simulation.distserve_prefill import NONE, OVERHEAD_MS, OVERHEAD_MS_PER_TOKEN
from placement.simulation.event_heap import pop_int, push_int

MAX_NUM_TOKENS = 50_000
"""Hard-coded in the reference for every model and parallelism."""
SHIFT = 32
MASK = (1 << SHIFT) - 1
NEVER = np.inf

# Columns of `requests`.
PROMPT, OUTPUT, NEXT, RANK = 0, 1, 2, 3
DONE = 4  # rotating: tokens decoded; flowing: step at which it joined
NUM_REQUEST_COLUMNS = 5

# Columns of `counts`.
ACTIVE = 0  # requests in the batch, and when rotating in the queue too
CONTEXT = 1  # tokens that these hold
STEP = 2  # steps done
HEAD, TAIL, WAITING = 3, 4, 5  # the queue
BATCH = 6  # rotating: head of the list that is being computed
FRONT, BACK = 7, 8  # least and greatest rank given out
ROTATING = 9
NUM_COUNT_COLUMNS = 10

# Columns of `clocks`.
BOUNDARY, BUSY = 0, 1  # end of the step under way, NEVER when idle; ms spent in steps


class DecodeState(NamedTuple):
    """Instances along the first axis, but for `requests` and `last_ms`."""

    rows: NDArray[np.float64]  # small a, b, c, large a, b, c, threshold
    clocks: NDArray[np.float64]
    counts: NDArray[np.int64]
    heap: NDArray[np.int64]  # flowing: (last step, request) in one number
    requests: NDArray[np.int64]
    last_ms: NDArray[np.float64]


def new_state(
    rows: NDArray[np.float64], prompts: NDArray[np.int64], outputs: NDArray[np.int64]
) -> DecodeState:
    """Idle instances with these coefficients, and requests that have not come yet."""
    num_instances, num = len(rows), len(prompts)
    requests = np.zeros((num, NUM_REQUEST_COLUMNS), np.int64)
    requests[:, PROMPT], requests[:, OUTPUT] = prompts, outputs
    counts = np.zeros((num_instances, NUM_COUNT_COLUMNS), np.int64)
    counts[:, [HEAD, TAIL, BATCH]] = NONE
    clocks = np.zeros((num_instances, 2))
    clocks[:, BOUNDARY] = NEVER
    heap = np.zeros((num_instances, min(num, MAX_NUM_TOKENS // 2) + 1), np.int64)
    return DecodeState(rows, clocks, counts, heap, requests, np.zeros(num))


@compiled
def step_ms(row: NDArray[np.float64], num_requests: int, context: int) -> float:
    """Time of one decode step."""
    offset = 0 if num_requests < row[6] else 3
    a, b, c = row[offset], row[offset + 1], row[offset + 2]
    overhead = OVERHEAD_MS + context * OVERHEAD_MS_PER_TOKEN
    return float(a + b * (context + num_requests) + c * num_requests + overhead)


@compiled
def enqueue(requests: NDArray[np.int64], count: NDArray[np.int64], request: int) -> None:
    """Append a request that has just been read to the queue of the instance of `count`."""
    requests[request, DONE] = 0
    _append(requests, count, request)
    if count[ROTATING]:
        count[ACTIVE] += 1
        count[CONTEXT] += requests[request, PROMPT]


@compiled
def _append(requests: NDArray[np.int64], count: NDArray[np.int64], request: int) -> None:
    requests[request, NEXT] = NONE
    if count[HEAD] == NONE:
        count[HEAD] = request
    else:
        requests[count[TAIL], NEXT] = request
    count[TAIL] = request
    count[WAITING] += 1


@inlined
def _start_rotating(state: DecodeState, instance: int, is_newest_first: bool) -> None:
    """Turn the heap into the queue that it stands for, behind or before what waits."""
    requests, count, heap = state.requests, state.counts[instance], state.heap[instance]
    size, num_waiting, newest = count[ACTIVE], count[WAITING], count[HEAD]
    request = newest
    while request != NONE:
        count[CONTEXT] += requests[request, PROMPT]
        request = requests[request, NEXT]
    if not is_newest_first:
        count[HEAD] = NONE
    for position in range(size):  # in place: by rank in place of the last step
        request = heap[position] & MASK
        push_int(heap, position, (requests[request, RANK] << SHIFT) | request)
    for left in range(size, 0, -1):
        request = heap[0] & MASK
        pop_int(heap, left)
        requests[request, DONE] = count[STEP] - requests[request, DONE]
        _append(requests, count, request)
    while not is_newest_first and newest != NONE:
        following = requests[newest, NEXT]
        _append(requests, count, newest)
        newest = following
    count[ACTIVE] = size + num_waiting
    count[WAITING] = size + num_waiting
    count[ROTATING] = 1
    count[BATCH] = NONE


@inlined
def _settle_rotating(state: DecodeState, instance: int) -> None:
    """The step that was under way has ended: what is not complete goes to the queue's end."""
    requests, count = state.requests, state.counts[instance]
    request = count[BATCH]
    while request != NONE:
        following = requests[request, NEXT]
        requests[request, DONE] += 1
        count[CONTEXT] += 1
        if requests[request, DONE] == requests[request, OUTPUT]:
            state.last_ms[request] = state.clocks[instance, BOUNDARY]
            count[ACTIVE] -= 1
            count[CONTEXT] -= requests[request, PROMPT] + requests[request, OUTPUT]
        else:
            _append(requests, count, request)
        request = following
    count[BATCH] = NONE


@inlined
def _start_rotated_step(state: DecodeState, instance: int) -> None:
    """Form a batch from the queue's front; flow again when all of it fits."""
    requests, count = state.requests, state.counts[instance]
    tokens, size, last = 0, 0, NONE
    request = count[HEAD]
    while request != NONE:
        needed = requests[request, PROMPT] + requests[request, DONE] + 1
        if needed > MAX_NUM_TOKENS - tokens:
            break
        tokens += needed
        size += 1
        last = request
        request = requests[request, NEXT]
    if request == NONE:
        _start_flowing(state, instance)
        return
    count[BATCH] = count[HEAD]
    count[HEAD] = request
    requests[last, NEXT] = NONE
    count[WAITING] -= size
    duration = step_ms(state.rows[instance], size, tokens - size)
    state.clocks[instance, BUSY] += duration
    state.clocks[instance, BOUNDARY] += duration


@inlined
def _start_flowing(state: DecodeState, instance: int) -> None:
    requests, count, heap = state.requests, state.counts[instance], state.heap[instance]
    request, size = count[HEAD], 0
    while request != NONE:
        requests[request, DONE] = count[STEP] - requests[request, DONE]
        count[BACK] += 1
        requests[request, RANK] = count[BACK]
        last_step = requests[request, DONE] + requests[request, OUTPUT]
        push_int(heap, size, (last_step << SHIFT) | request)
        size += 1
        request = requests[request, NEXT]
    count[ACTIVE] = size
    count[HEAD], count[WAITING], count[ROTATING] = NONE, 0, 0


@compiled
def settle(state: DecodeState, instance: int) -> None:
    """The step that was under way has ended: count its tokens, let go of what is complete."""
    count = state.counts[instance]
    if count[ROTATING]:
        _settle_rotating(state, instance)
        return
    heap, requests = state.heap[instance], state.requests
    step, size = count[STEP] + 1, count[ACTIVE]
    context = count[CONTEXT] + size
    while size > 0 and heap[0] >> SHIFT == step:
        request = heap[0] & MASK
        state.last_ms[request] = state.clocks[instance, BOUNDARY]
        context -= requests[request, PROMPT] + requests[request, OUTPUT]
        pop_int(heap, size)
        size -= 1
    count[STEP], count[ACTIVE], count[CONTEXT] = step, size, context


@compiled
def admit(state: DecodeState, instance: int, is_newest_first: bool) -> None:
    """Merge what waits with what was being computed.

    `is_newest_first`: requests that came during the step stand before those it computed.
    """
    count, requests = state.counts[instance], state.requests
    if count[ROTATING]:
        return
    size, num_waiting, context = count[ACTIVE], count[WAITING], count[CONTEXT]
    request = count[HEAD]
    while request != NONE:
        context += requests[request, PROMPT]
        request = requests[request, NEXT]
    if context + size + num_waiting > MAX_NUM_TOKENS:
        _start_rotating(state, instance, is_newest_first)
        return
    if num_waiting == 0:
        return
    rank = count[BACK] + 1
    if is_newest_first:
        rank = count[FRONT] - num_waiting
        count[FRONT] = rank
    else:
        count[BACK] += num_waiting
    heap, step = state.heap[instance], count[STEP]
    request = count[HEAD]
    while request != NONE:
        requests[request, DONE] = step
        requests[request, RANK] = rank
        push_int(heap, size, ((step + requests[request, OUTPUT]) << SHIFT) | request)
        size += 1
        rank += 1
        request = requests[request, NEXT]
    count[HEAD], count[WAITING] = NONE, 0
    count[ACTIVE], count[CONTEXT] = size, context


@compiled
def start_steps(state: DecodeState, instance: int, limit_ms: float) -> None:
    """Start decoding at the boundary, or fall idle.

    Flowing, an unchanged batch runs to the first boundary at or after the limit, or to its next
    end: the steps before the last one are counted at once, the last one is under way afterwards.
    """
    count, clock = state.counts[instance], state.clocks[instance]
    if count[ROTATING]:
        _start_rotated_step(state, instance)
        if count[ROTATING]:
            return
    size, context = count[ACTIVE], count[CONTEXT]
    if size == 0:
        clock[BOUNDARY] = NEVER
        return
    row = state.rows[instance]
    growth = (row[1 if size < row[6] else 4] + OVERHEAD_MS_PER_TOKEN) * size
    first = step_ms(row, size, context)
    steps = (state.heap[instance, 0] >> SHIFT) - count[STEP]
    if context + size * steps > MAX_NUM_TOKENS:
        steps = (MAX_NUM_TOKENS - context - size) // size + 1
    total = first * steps + growth * (0.5 * steps * (steps - 1))
    span = limit_ms - clock[BOUNDARY]
    if total >= span:
        steps = _steps_to(first, growth, span, steps)
        total = first * steps + growth * (0.5 * steps * (steps - 1))
    count[STEP] += steps - 1
    count[CONTEXT] = context + size * (steps - 1)
    clock[BUSY] += total
    clock[BOUNDARY] += total


@inlined
def _steps_to(first: float, growth: float, span: float, most: int) -> int:
    """Least n >= 1 with first * n + growth * n * (n - 1) / 2 >= span; it is at most `most`."""
    if first >= span:
        return 1
    if growth > 0.0:
        linear = first - 0.5 * growth
        steps = int((np.sqrt(linear * linear + 2.0 * growth * span) - linear) / growth)
    else:
        steps = int(span / first)
    steps = min(max(steps, 1), most)
    while steps > 1 and first * (steps - 1) + growth * (0.5 * (steps - 1) * (steps - 2)) >= span:
        steps -= 1
    while steps < most and first * steps + growth * (0.5 * steps * (steps - 1)) < span:
        steps += 1
    return steps


@compiled
def advance(state: DecodeState, instance: int, limit_ms: float) -> None:
    """Process all step ends before `limit_ms`; an end at the limit itself is left for later."""
    while state.clocks[instance, BOUNDARY] < limit_ms:
        if state.counts[instance, ACTIVE] > 0:
            settle(state, instance)
        admit(state, instance, True)
        start_steps(state, instance, limit_ms)


@compiled
def run_decode_pool(
    state: DecodeState,
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends_ms: NDArray[np.float64],
    by_end: NDArray[np.int64],
    instance: NDArray[np.int64],
) -> None:
    """Decode what `run_prefill_pool` has read; fills `state.last_ms` and `instance`.

    A request goes to the instance with the shortest queue when its prefill batch ends; what is
    being computed does not count. `by_end` lists the batches by their end.
    """
    num_instances = len(state.counts)
    counts, requests = state.counts, state.requests
    for batch in by_end:
        now = ends_ms[batch]
        for position in range(starts[batch], starts[batch + 1]):
            request = order[position]
            if requests[request, OUTPUT] == 0:
                state.last_ms[request] = now
                continue
            best, shortest = 0, np.int64(-1)
            for candidate in range(num_instances):
                if counts[candidate, WAITING] > 0:
                    advance(state, candidate, now)
                num_waiting = counts[candidate, WAITING]
                if shortest < 0 or num_waiting < shortest:
                    best, shortest = candidate, num_waiting
                if num_waiting == 0:
                    break
            advance(state, best, now)
            enqueue(requests, counts[best], request)
            instance[request] = best
            if state.clocks[best, BOUNDARY] == NEVER:
                state.clocks[best, BOUNDARY] = now
    for candidate in range(num_instances):
        advance(state, candidate, NEVER)
