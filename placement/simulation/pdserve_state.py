"""What our own router and workers hold in a simulation (rules pdserve), and how long steps take.

One kind of instance for all roles: it may read prompts, decode, or do both in the same steps.
Kernels import this module as `at`: `row[at.DEPTH]`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdserve.domain.latency import num_attention_pairs
from placement.simulation.compiled import compiled, inlined
from placement.simulation.event_heap import push

NONE = -1
NEVER = np.inf
SHIFT = 32
MASK = (1 << SHIFT) - 1
MAX_PROMPTS_IN_STEP = 256

# Columns of `requests`.
PROMPT, OUTPUT, NEXT = 0, 1, 2
READ = 3  # tokens that are in a step, or cached
READER, WRITER = 4, 5
READER_BLOCKS, WRITER_BLOCKS = 6, 7
SENT = 8  # tokens whose KV has been handed to the link
NUM_REQUEST_COLUMNS = 9

# Columns of `request_s`.
ARRIVAL_S, FIRST_S, END_S, DEADLINE_S = 0, 1, 2, 3
NUM_REQUEST_TIMES = 4

# Columns of `instances`.
READS, WRITES, DEPTH, BUDGET, MAX_ACTIVE = 0, 1, 2, 3, 4
QUEUE = 5  # prompts to read: head, tail, length
UNREAD = 8  # tokens of prompts that were sent here and have no first token
IN_FLIGHT, OLDEST = 9, 10  # steps in the pipeline, DEPTH at most; the ring place of the first
FREE_BLOCKS, NUM_BLOCKS = 11, 12
WAITING = 13  # for blocks or a place: head, tail, length
JOINING = 16  # KV is here, next step's batch: head, tail, length
ACTIVE, CONTEXT, STEP = 19, 20, 21
RUN_STEPS, IS_CUT, VERSION = 22, 23, 24
ASSIGNED = 25  # requests that the router sent here to decode, or to read for another
ASSIGNED_TOKENS = 26  # of those that are not in the batch yet: prompts, and first tokens
NUM_KNOTS = 27
NUM_CACHED = 28  # prefix blocks
IS_STAGE_BUSY = 29
ADMITTED = 30  # requests that hold blocks to decode, read or not: MAX_ACTIVE at most
ASSIGNED_BLOCKS = 31  # of the whole answers that the router sent here
NUM_INSTANCE_COLUMNS = 32

# Columns of `instance_s`.
RUN_START, RUN_FIRST, RUN_GROWTH, BUSY = 0, 1, 2, 3
UNREAD_PAIRS = 4  # of the tokens in UNREAD
LINK_OUT_FREE, LINK_IN_FREE, SECONDS_PER_TOKEN, LINK_LATENCY = 5, 6, 7, 8
SHARED_S, PROMPT_S, PROMPT_TOKEN_S = 9, 10, 11
BESIDE, WAKE_S = 12, 13  # see `Pool.beside` and `.wake_s`
SLOWED, STEP_END = 14, 15  # of a reader's step under way
STOLEN_S, OWED_S = 16, 17  # see `Pool.stolen_s`; what the next step takes longer for it
BESIDE_ANSWER = 18
# What the router is told of step times: the coefficients of `pdserve.domain.latency`.
TOLD_FIXED_S, TOLD_PROMPT_S, TOLD_PAIR_S, TOLD_ANSWER_S, TOLD_CONTEXT_S = 19, 20, 21, 22, 23
STAGES = 24  # when each stage of the pipeline is free

# Kinds of events.
ARRIVE, STEP_DONE, STAGE_FREE, RUN_DONE, KV_HERE, RELEASE, WAKE, PREPARED = 0, 1, 2, 3, 4, 5, 6, 7

# Entries of `scalars`.
NUM_EVENTS, NUM_MADE, NUM_UNREAD_REQUESTS, NEXT_REQUEST, NUM_REFUSED = 0, 1, 2, 3, 4
BLOCK_SIZE, IS_CLOSED_LOOP, BY_DEADLINE, MAX_UNREAD_REQUESTS = 5, 6, 7, 8
PREFIX_BLOCK, CACHE_BLOCKS, HIT_TOKENS = 9, 10, 11
DECODE_TABLE = 12  # where the decode tables begin in a row of `curves`; as long as each other
TABLE_SIZE = 13
NUM_READERS, NUM_WRITERS = 14, 15  # of one role alone: these slow each other
NUM_BUSY_READERS, NUM_BUSY_WRITERS = 16, 17
IS_SHARED = 18  # whether any step takes longer beside others
MAX_STALE_EVENTS = 19  # events in the heap beyond which no step's end is moved any more
COUNTS_REQUESTS = 20  # whether the router's policy is least_requests
NUM_SCALARS = 21

# Entries of `rates`.
HANDOFF_S, MAX_TOKENS_FACTOR, MAX_WAIT_S, BUSY_HANDOFF_S = 0, 1, 2, 3
LONGEST_WAIT_S = 4  # that was predicted to a request and let in


class Cluster(NamedTuple):
    requests: NDArray[np.int64]
    request_s: NDArray[np.float64]
    instances: NDArray[np.int64]
    instance_s: NDArray[np.float64]
    curves: NDArray[np.float64]  # per instance: tokens, prefill s, pair s, decode s [B], context s
    heap: NDArray[np.int64]  # per instance: (last step, request) of the batch
    chunks: NDArray[np.int64]  # [instance, ring, entry, (request, end)]; entry 0: their number
    event_s: NDArray[np.float64]
    event_number: NDArray[np.int64]
    events: NDArray[np.int64]
    scalars: NDArray[np.int64]
    rates: NDArray[np.float64]
    cache: NDArray[np.int32]  # [instance, 2, block]: a ring by age; the last block is its start
    prefix: NDArray[np.int64]  # ids of all requests' blocks
    prefix_starts: NDArray[np.int64]


@compiled
def schedule(c: Cluster, time: float, kind: int, target: int, version: int) -> None:
    """Events of one time come in the order in which they were scheduled."""
    c.scalars[NUM_EVENTS] = push(
        c.event_s,
        c.event_number,
        c.events,
        c.scalars[NUM_EVENTS],
        time,
        c.scalars[NUM_MADE],
        kind | (target << 3) | (version << 35),
    )
    c.scalars[NUM_MADE] += 1


@compiled
def enqueue(c: Cluster, instance: int, queue: int, request: int) -> None:
    row = c.instances[instance]
    c.requests[request, NEXT] = NONE
    if row[queue] == NONE:
        row[queue] = request
    else:
        c.requests[row[queue + 1], NEXT] = request
    row[queue + 1] = request
    row[queue + 2] += 1


@inlined
def dequeue(c: Cluster, instance: int, queue: int) -> int:
    row = c.instances[instance]
    request = row[queue]
    row[queue] = c.requests[request, NEXT]
    row[queue + 2] -= 1
    return int(request)


@compiled
def prefill_s(c: Cluster, instance: int, tokens: float, pairs: float) -> float:
    """One step that reads `tokens`, the attention of which covers `pairs`."""
    row, size = c.curves[instance], c.instances[instance, NUM_KNOTS]
    left, last = 0, size - 2
    while left < last:
        middle = (left + last) // 2
        if row[middle + 1] < tokens:
            left = middle + 1
        else:
            last = middle
    along = (tokens - row[left]) / (row[left + 1] - row[left])
    at = size + left
    base = row[at] + (row[at + 1] - row[at]) * along
    at += size
    rate = row[at] + (row[at + 1] - row[at]) * min(max(along, 0.0), 1.0)
    return float(base + rate * pairs)


@inlined
def decode_s(c: Cluster, instance: int, num_requests: int, context: float) -> float:
    """One decode step of a batch."""
    size = c.scalars[TABLE_SIZE]
    row, at = c.curves[instance], c.scalars[DECODE_TABLE] + min(num_requests, size - 1)
    return float(row[at] + row[at + size] * context)


@inlined
def context_s(c: Cluster, instance: int, num_requests: int) -> float:
    """What each context token adds to a step."""
    size = c.scalars[TABLE_SIZE]
    at = c.scalars[DECODE_TABLE] + min(num_requests, size - 1)
    return float(c.curves[instance, at + size])


@inlined
def num_blocks(c: Cluster, tokens: int) -> int:
    return int((tokens + c.scalars[BLOCK_SIZE] - 1) // c.scalars[BLOCK_SIZE])


num_pairs = inlined(num_attention_pairs)


@compiled
def step_under_way(c: Cluster, instance: int, now: float) -> int:
    """Which step of a decoding run is computed at `now`, from 1; a step's end belongs to it."""
    clock = c.instance_s[instance]
    first, growth, span = clock[RUN_FIRST], clock[RUN_GROWTH], now - clock[RUN_START]
    steps = 1
    if span > first:
        linear = first - 0.5 * growth
        root = np.sqrt(linear * linear + 2.0 * growth * span)
        steps = max(int(np.ceil(2.0 * span / (linear + root))), 1)
    while steps > 1 and first * (steps - 1) + growth * (0.5 * (steps - 1) * (steps - 2)) >= span:
        steps -= 1
    while first * steps + growth * (0.5 * steps * (steps - 1)) < span:
        steps += 1
    return steps
