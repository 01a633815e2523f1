"""DistServe's rules for any pipeline depth: every stage an actor, every step an event.

The events and their order are those of the reference's simpy processes: by time, then in the order
in which they were scheduled; arrivals, scheduled before all else, come first. Slower than the
closed forms of `distserve_decode`, which it is also the check of.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.simulation.compiled import compiled, inlined
from placement.simulation.distserve_colocated import MAX_DECODE_QUEUE_TOKENS
from placement.simulation.distserve_decode import MAX_NUM_TOKENS
from placement.simulation.distserve_prefill import (
    NONE,
    OVERHEAD_MS,
    OVERHEAD_MS_PER_TOKEN,
    stage_ms,
)
from placement.simulation.event_heap import pop, push

# Columns of `requests`.
PROMPT, OUTPUT, NEXT, DONE, CHUNK = 0, 1, 2, 3, 4
NUM_REQUEST_COLUMNS = 5

# Columns of `workers`; a worker is one stage of one instance.
PREFILL, DECODE = 0, 3  # queues: head, tail, length each
CONTEXT = 6  # tokens of the decode queue
BATCH = 7  # head of the list that is being computed
READING = 8  # prompts in the running batch
STATE = 9
FOLLOWER = 10  # the next stage; of the last stage the first
IS_FIRST, IS_LAST = 11, 12
IS_COLOCATED = 13
INSTANCE = 14

IDLE, WOKEN, READS, DECODES = 0, 1, 2, 3


class Pipelines(NamedTuple):
    """Stages of all instances, prefill or colocated ones first."""

    workers: NDArray[np.int64]
    prefill_rows: NDArray[np.float64]  # per worker: a, b, c, depth, max_tokens
    decode_rows: NDArray[np.float64]  # per worker: small a, b, c, large a, b, c, threshold, depth
    requests: NDArray[np.int64]
    first_ms: NDArray[np.float64]
    last_ms: NDArray[np.float64]
    busy_ms: NDArray[np.float64]  # per worker
    decode_instance: NDArray[np.int64]
    decode_heads: NDArray[np.int64]  # stage 0 of each decode instance
    times: NDArray[np.float64]  # events
    sequence: NDArray[np.int64]
    items: NDArray[np.int64]
    counters: NDArray[np.int64]  # events held, events made, chunks made


@compiled
def _schedule(p: Pipelines, time: float, worker: int) -> None:
    p.counters[0] = push(p.times, p.sequence, p.items, p.counters[0], time, p.counters[1], worker)
    p.counters[1] += 1


@compiled
def _hand(p: Pipelines, worker: int, queue: int, request: int, now: float) -> None:
    """Append to a worker's queue and wake it."""
    row = p.workers[worker]
    p.requests[request, NEXT] = NONE
    if row[queue] == NONE:
        row[queue] = request
    else:
        p.requests[row[queue + 1], NEXT] = request
    row[queue + 1] = request
    row[queue + 2] += 1
    if queue == DECODE:
        row[CONTEXT] += p.requests[request, PROMPT] + p.requests[request, DONE]
    if row[STATE] == IDLE:
        row[STATE] = WOKEN
        _schedule(p, now, worker)


@inlined
def _start_prefill(p: Pipelines, worker: int, now: float) -> None:
    row = p.workers[worker]
    request, tokens, squares, count, last = row[PREFILL], 0, 0, 0, NONE
    row[BATCH] = request
    budget = int(p.prefill_rows[worker, 4])
    chunk = p.requests[request, CHUNK]
    if row[IS_FIRST]:
        chunk = p.counters[2]
        p.counters[2] += 1
    while request != NONE:
        prompt = p.requests[request, PROMPT]
        if row[IS_FIRST] and prompt > budget - tokens:
            break
        if not row[IS_FIRST] and p.requests[request, CHUNK] != chunk:
            break
        p.requests[request, CHUNK] = chunk
        tokens += prompt
        squares += prompt * prompt
        count += 1
        last = request
        request = p.requests[request, NEXT]
    p.requests[last, NEXT] = NONE
    row[PREFILL] = request
    row[PREFILL + 2] -= count
    row[READING] = count
    duration = stage_ms(p.prefill_rows[worker], tokens, squares)
    if row[IS_FIRST]:
        duration += OVERHEAD_MS + tokens * OVERHEAD_MS_PER_TOKEN
    row[STATE] = READS
    p.busy_ms[worker] += duration
    _schedule(p, now + duration, worker)


@inlined
def _start_decode(p: Pipelines, worker: int, now: float) -> None:
    row = p.workers[worker]
    request, tokens, count, last = row[DECODE], 0, 0, NONE
    row[BATCH] = request
    while request != NONE:
        needed = p.requests[request, PROMPT] + p.requests[request, DONE] + 1
        if needed > MAX_NUM_TOKENS - tokens:
            break
        tokens += needed
        count += 1
        last = request
        request = p.requests[request, NEXT]
    p.requests[last, NEXT] = NONE
    row[DECODE] = request
    row[DECODE + 2] -= count
    row[CONTEXT] -= tokens - count
    rates = p.decode_rows[worker]
    offset = 0 if count < rates[6] else 3
    duration = rates[offset] + rates[offset + 1] * tokens + rates[offset + 2] * count
    duration = duration * (1.0 / rates[7])
    if row[IS_FIRST]:
        duration += OVERHEAD_MS + (tokens - count) * OVERHEAD_MS_PER_TOKEN
    row[STATE] = DECODES
    p.busy_ms[worker] += duration
    _schedule(p, now + duration, worker)


@inlined
def _end_prefill(p: Pipelines, worker: int, now: float) -> None:
    row = p.workers[worker]
    row[READING] = 0
    request = row[BATCH]
    while request != NONE:
        following = p.requests[request, NEXT]
        if not row[IS_LAST]:
            _hand(p, row[FOLLOWER], PREFILL, request, now)
        else:
            p.first_ms[request] = now
            if p.requests[request, OUTPUT] == 0:
                p.last_ms[request] = now
            elif row[IS_COLOCATED]:
                p.decode_instance[request] = row[INSTANCE]
                _hand(p, row[FOLLOWER], DECODE, request, now)
            else:
                best = 0
                for candidate in range(1, len(p.decode_heads)):
                    length = p.workers[p.decode_heads[candidate], DECODE + 2]
                    if length < p.workers[p.decode_heads[best], DECODE + 2]:
                        best = candidate
                p.decode_instance[request] = p.workers[p.decode_heads[best], INSTANCE]
                _hand(p, p.decode_heads[best], DECODE, request, now)
        request = following


@inlined
def _end_decode(p: Pipelines, worker: int, now: float) -> None:
    row = p.workers[worker]
    request = row[BATCH]
    while request != NONE:
        following = p.requests[request, NEXT]
        if row[IS_LAST]:
            p.requests[request, DONE] += 1
        if p.requests[request, DONE] == p.requests[request, OUTPUT]:
            p.last_ms[request] = now
        else:
            _hand(p, row[FOLLOWER], DECODE, request, now)
        request = following


@compiled
def run_pipelines(
    p: Pipelines,
    arrival_ms: NDArray[np.float64],
    heads: NDArray[np.int64],
    instance: NDArray[np.int64],
) -> None:
    """Serve every request; `heads` are the workers that take new ones, `instance` is filled."""
    index, num = 0, len(arrival_ms)
    while index < num or p.counters[0] > 0:
        if p.counters[0] == 0 or (index < num and arrival_ms[index] <= p.times[0]):
            best, least = 0, np.int64(-1)
            for candidate in range(len(heads)):
                row = p.workers[heads[candidate]]
                load = row[READING] + row[PREFILL + 2]
                if least < 0 or load < least:
                    best, least = candidate, load
            instance[index] = p.workers[heads[best], INSTANCE]
            _hand(p, heads[best], PREFILL, index, arrival_ms[index])
            index += 1
            continue
        now, worker = p.times[0], p.items[0]
        p.counters[0] = pop(p.times, p.sequence, p.items, p.counters[0])
        row = p.workers[worker]
        if row[STATE] == READS:
            _end_prefill(p, worker, now)
        elif row[STATE] == DECODES:
            _end_decode(p, worker, now)
        if row[PREFILL + 2] == 0 and row[DECODE + 2] == 0:
            row[STATE] = IDLE
        elif row[PREFILL + 2] > 0 and row[CONTEXT] <= MAX_DECODE_QUEUE_TOKENS:
            _start_prefill(p, worker, now)
        else:
            _start_decode(p, worker, now)
