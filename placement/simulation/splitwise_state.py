"""What Splitwise's machines and requests hold, and the event queue of its simulator.

A request is two tasks: prompt `2 * r` and token `2 * r + 1`. Lists are rows of arrays with a
length; they keep the order of the reference's Python lists, on which its choices depend. Kernels
import this module as `at`: `c.tasks[task, at.GOAL]`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.simulation.compiled import compiled, inlined

# Task states.
NEW, QUEUED, RUNNING, BLOCKED, DONE = 0, 1, 2, 3, 4

# Columns of `tasks`.
STATE, PREEMPTIONS, TOKENS, MADE, MAKING, MEMORY, IN_BATCH, MARK = 0, 1, 2, 3, 4, 5, 6, 7
GOAL = 8  # tokens that it makes in all
# Of the request, kept with its prompt task: its machines, and the bytes of KV that it holds.
PROMPT_AT, TOKEN_AT, HELD = 9, 10, 11
NUM_TASK_COLUMNS = 12

# Columns of `request_s`.
ARRIVAL_S, FIRST_S, END_S, TRANSFER_S = 0, 1, 2, 3

# Columns of `machines`.
KV, MAX_KV, PROMISED = 0, 1, 2  # bytes: used, limit, what the scheduler has assigned
PENDING_TOKENS = 3  # the scheduler's count
BATCH_TOKENS = 4
ITERATIONS = 5
IS_PAUSING = 6
VERSION = 7  # of the iteration event; an older one in the queue is void
NUM_PROMPTS = 8  # prompts in the batch
IS_MIXED = 9
HOME = 10  # POOL_PROMPT, POOL_TOKEN
NUM_KNOTS = 11
LENGTHS = 12  # of the machine's lists
NUM_MACHINE_COLUMNS = 17

# Lists of a machine.
PENDING, PROMPTS, BLOCKED_TASKS, POOL, BATCH = 0, 1, 2, 3, 4
NUM_LISTS = 5

# Lists of the scheduler, which is the last row of `machines`: machines by pool.
POOL_PROMPT, POOL_MIXED, POOL_TOKEN = 0, 1, 2
NEW_BATCH = 3  # where a machine's next batch is put together
COMPLETE = 4  # who of a batch has ended, in its order

# Columns of `machine_s`; the curves follow: batch tokens, prompt seconds, token seconds.
ITERATION_S, ITERATION_END, BUSY = 0, 1, 2
RETRY_S = 0  # in the scheduler's row
CURVES = 3

# Kinds of events, in the lowest bits of an event's payload.
ARRIVAL, ITERATION, TRANSFERRED, RETRY = 0, 1, 2, 3

# Entries of `scalars`.
MAX_BATCH_SIZE, MAX_BATCH_TOKENS, MAX_PREEMPTIONS, MAX_QUEUED_TOKENS, SCHEDULER = 0, 1, 2, 3, 4
NUM_EVENTS, EPOCH = 5, 6
NUM_SCALARS = 7
MIXED_POOL, TOKEN_JSQ, KV_JSQ, KV_TOKEN_JSQ = 0, 1, 2, 3


class Cluster(NamedTuple):
    """Few arrays with many columns: each one that a function is handed costs time to compile."""

    tasks: NDArray[np.int64]
    request_s: NDArray[np.float64]
    machines: NDArray[np.int64]
    machine_s: NDArray[np.float64]
    lists: NDArray[np.int64]  # [machine, list, position]
    event_s: NDArray[np.float64]
    events: NDArray[np.int64]
    scalars: NDArray[np.int64]


@compiled
def schedule(c: Cluster, time: float, payload: int) -> None:
    """Python's `heapq.heappush` on events that are compared by time alone."""
    position = c.scalars[NUM_EVENTS]
    c.scalars[NUM_EVENTS] += 1
    _sift_down(c, position, time, payload)


@inlined
def _sift_down(c: Cluster, position: int, time: float, payload: int) -> None:
    while position > 0:
        parent = (position - 1) >> 1
        if not time < c.event_s[parent]:
            break
        c.event_s[position] = c.event_s[parent]
        c.events[position] = c.events[parent]
        position = parent
    c.event_s[position] = time
    c.events[position] = payload


@compiled
def drop_first_event(c: Cluster) -> None:
    """`heapq.heappop`: among equal times its order is that of the heap, not of scheduling."""
    last = c.scalars[NUM_EVENTS] - 1
    c.scalars[NUM_EVENTS] = last
    time, payload = c.event_s[last], c.events[last]
    position = 0
    while 2 * position + 1 < last:
        child = 2 * position + 1
        if child + 1 < last and not c.event_s[child] < c.event_s[child + 1]:
            child += 1
        c.event_s[position] = c.event_s[child]
        c.events[position] = c.events[child]
        position = child
    if last > 0:
        _sift_down(c, position, time, payload)


@inlined
def append(c: Cluster, machine: int, which: int, item: int) -> None:
    c.lists[machine, which, c.machines[machine, LENGTHS + which]] = item
    c.machines[machine, LENGTHS + which] += 1


@compiled
def insert(c: Cluster, machine: int, which: int, position: int, item: int) -> None:
    row = c.lists[machine, which]
    for index in range(c.machines[machine, LENGTHS + which], position, -1):
        row[index] = row[index - 1]
    row[position] = item
    c.machines[machine, LENGTHS + which] += 1


@compiled
def remove(c: Cluster, machine: int, which: int, item: int) -> None:
    """Drop the first occurrence; nothing happens where there is none."""
    row, length = c.lists[machine, which], c.machines[machine, LENGTHS + which]
    index = 0
    while index < length and row[index] != item:
        index += 1
    if index == length:
        return
    for position in range(index, length - 1):
        row[position] = row[position + 1]
    c.machines[machine, LENGTHS + which] = length - 1


@compiled
def add_pending(c: Cluster, machine: int, task: int) -> None:
    """Into the pending list by (preemptions, arrival), as `bisect.insort` would.

    Preemptions of listed tasks grow without their being moved, so the list may be out of order;
    the bisection is that of the reference all the same.
    """
    row = c.lists[machine, PENDING]
    preemptions, arrival = c.tasks[task, PREEMPTIONS], c.request_s[task >> 1, ARRIVAL_S]
    low, high = 0, c.machines[machine, LENGTHS + PENDING]
    while low < high:
        middle = (low + high) // 2
        other = row[middle]
        theirs = c.tasks[other, PREEMPTIONS]
        if preemptions < theirs or (
            preemptions == theirs and arrival < c.request_s[other >> 1, ARRIVAL_S]
        ):
            high = middle
        else:
            low = middle + 1
    insert(c, machine, PENDING, low, task)


@compiled
def add_to_pool(c: Cluster, machine: int, request: int) -> None:
    """Requests of a machine, by arrival; equal ones in the order in which they came."""
    row, arrival_s = c.lists[machine, POOL], c.request_s[request, ARRIVAL_S]
    position = c.machines[machine, LENGTHS + POOL]
    for index in range(position - 1, -1, -1):
        if row[index] == request:
            return
        if c.request_s[row[index], ARRIVAL_S] < arrival_s:
            break
    while (
        position > 0 and c.request_s[row[position - 1], ARRIVAL_S] > c.request_s[request, ARRIVAL_S]
    ):
        position -= 1
    insert(c, machine, POOL, position, request)


@inlined
def first_task(c: Cluster, machine: int, request: int) -> int:
    """The task of a pooled request that is up next on this machine."""
    if c.tasks[2 * request, PROMPT_AT] == machine and c.tasks[2 * request, STATE] != DONE:
        return 2 * request
    return 2 * request + 1


@inlined
def iteration_s(c: Cluster, machine: int, curve: int, tokens: int) -> float:
    """`placement.simulation.timing.interpolate`; `curve` 1 is prompts, 2 tokens."""
    size = c.machines[machine, NUM_KNOTS]
    row = c.machine_s[machine]
    left = 0
    while left < size - 2 and row[CURVES + left + 1] < tokens:
        left += 1
    knot, value = CURVES + left, CURVES + curve * size + left
    slope = (row[value + 1] - row[value]) / (row[knot + 1] - row[knot])
    return float(slope * (tokens - row[knot]) + row[value])
