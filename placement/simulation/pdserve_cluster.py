"""Our router and the event loop: who reads and who decodes (`router.policy`), in what order.

The decode side's blocks for prompt and answer are promised before the prompt is read; a request
waits there, first come first served, while they are not free.
"""

from placement.simulation.compiled import compiled, inlined
from placement.simulation.event_heap import pop
from placement.simulation.pdserve_shared import steal
from placement.simulation.pdserve_state import (
    ACTIVE,
    ARRIVAL_S,
    ARRIVE,
    ASSIGNED,
    ASSIGNED_PROMPTS,
    BUDGET,
    CONTEXT,
    DEADLINE_S,
    DEPTH,
    END_S,
    FIRST_S,
    FREE_BLOCKS,
    FULL_PAIR_S,
    FULL_S,
    HANDOFF_S,
    IS_CLOSED_LOOP,
    IS_STAGE_BUSY,
    KV_HERE,
    MAX_ACTIVE,
    MAX_TOKENS_FACTOR,
    MAX_UNREAD_REQUESTS,
    MAX_WAIT_S,
    NEVER,
    NEXT_REQUEST,
    NONE,
    NUM_BLOCKS,
    NUM_EVENTS,
    NUM_REFUSED,
    NUM_UNREAD_REQUESTS,
    OUTPUT,
    PREPARED,
    PROMPT,
    READER,
    READER_BLOCKS,
    READS,
    RELEASE,
    STAGE_FREE,
    STEP_DONE,
    UNREAD,
    UNREAD_PAIRS,
    VERSION,
    WAITING,
    WAKE,
    WRITER,
    WRITER_BLOCKS,
    WRITES,
    Cluster,
    decode_s,
    enqueue,
    num_blocks,
    num_pairs,
    prefill_s,
    schedule,
    step_under_way,
)
from placement.simulation.pdserve_workers import (
    admit,
    finish_chunks,
    finish_run,
    has_room,
    queue_prompt,
    receive_kv,
    release,
    start_step,
    start_woken,
)
from placement.simulation.prefix_cache import cached_tokens


@compiled
def _queue_s(c: Cluster, reader: int, tokens: int, pairs: float) -> float:
    """Time to read what was sent to a reader, and `tokens` more."""
    row, clock = c.instances[reader], c.instance_s[reader]
    budget = row[BUDGET]
    total = row[UNREAD] + tokens
    full, rest = total // budget, total % budget
    seconds = full * clock[FULL_S] + (clock[UNREAD_PAIRS] + pairs) * clock[FULL_PAIR_S]
    if rest > 0:
        seconds += prefill_s(c, reader, rest, 0.0)
    return float(seconds / row[DEPTH])


@compiled
def _read_s(c: Cluster, reader: int, request: int) -> float:
    prompt = c.requests[request, PROMPT]
    cached = cached_tokens(c, reader, request)
    return _queue_s(c, reader, prompt - cached, num_pairs(cached, prompt - cached))


@inlined
def _choose_pair(c: Cluster, request: int, now: float) -> None:
    """The pair with the least predicted time to the last token; a full decode side comes last.

    Ties go to the most free blocks, then to the smallest numbers.
    """
    best_reader, best_read_s = NONE, NEVER
    for reader in range(len(c.instances)):
        if c.instances[reader, READS] and not c.instances[reader, WRITES]:
            seconds = _read_s(c, reader, request)
            if seconds < best_read_s:
                best_reader, best_read_s = reader, seconds
    prompt = c.requests[request, PROMPT]
    max_tokens = c.requests[request, OUTPUT] * c.rates[MAX_TOKENS_FACTOR]
    needed = c.requests[request, WRITER_BLOCKS]
    best, best_full, best_s, best_free = NONE, True, NEVER, 0
    for writer in range(len(c.instances)):
        row = c.instances[writer]
        if not row[WRITES] or needed > row[NUM_BLOCKS]:
            continue
        read_s = _read_s(c, writer, request) if row[READS] else best_read_s
        size = row[ASSIGNED] + 1
        context = row[CONTEXT] + row[ASSIGNED_PROMPTS] + prompt
        if row[ACTIVE] > 0:
            context += row[ACTIVE] * (step_under_way(c, writer, now) - 1)
        part = (size + row[DEPTH] - 1) // row[DEPTH]
        step_s = decode_s(c, writer, part, context / row[DEPTH])
        seconds = read_s + c.rates[HANDOFF_S] + max_tokens * step_s
        free = row[FREE_BLOCKS] - needed
        is_full = free < 0 or row[ASSIGNED] >= row[MAX_ACTIVE] or row[WAITING] != NONE
        is_better = best == NONE or (best_full and not is_full)
        if not is_better and is_full == best_full:
            is_better = seconds < best_s or (seconds == best_s and free > best_free)
        if is_better:
            best, best_full, best_s, best_free = writer, is_full, seconds, free
    c.requests[request, WRITER] = best
    c.requests[request, READER] = best if c.instances[best, READS] else best_reader


@inlined
def _is_refused(c: Cluster, request: int) -> bool:
    limit = c.scalars[MAX_UNREAD_REQUESTS]
    if limit > 0 and c.scalars[NUM_UNREAD_REQUESTS] >= limit:
        return True
    longest = c.rates[MAX_WAIT_S]
    return bool(longest > 0.0 and _queue_s(c, c.requests[request, READER], 0, 0.0) > longest)


@inlined
def _arrive(c: Cluster, request: int, now: float) -> None:
    c.request_s[request, ARRIVAL_S] = now
    c.request_s[request, DEADLINE_S] += now  # which held the class's promise
    prompt = c.requests[request, PROMPT]
    max_tokens = int(c.requests[request, OUTPUT] * c.rates[MAX_TOKENS_FACTOR] + 0.5)
    c.requests[request, WRITER_BLOCKS] = num_blocks(c, prompt + max_tokens)
    c.requests[request, READER_BLOCKS] = num_blocks(c, prompt)
    _choose_pair(c, request, now)
    if _is_refused(c, request):
        c.scalars[NUM_REFUSED] += 1
        c.request_s[request, FIRST_S], c.request_s[request, END_S] = NEVER, NEVER
        c.requests[request, READER], c.requests[request, WRITER] = NONE, NONE
        if c.scalars[IS_CLOSED_LOOP] and c.scalars[NEXT_REQUEST] < len(c.requests):
            schedule(c, now, ARRIVE, c.scalars[NEXT_REQUEST], 0)
            c.scalars[NEXT_REQUEST] += 1
        return
    reader, writer = c.requests[request, READER], c.requests[request, WRITER]
    c.scalars[NUM_UNREAD_REQUESTS] += 1
    c.instances[reader, UNREAD] += prompt
    c.instance_s[reader, UNREAD_PAIRS] += num_pairs(0, prompt)
    steal(c, writer, now)
    row = c.instances[writer]
    row[ASSIGNED] += 1
    row[ASSIGNED_PROMPTS] += prompt
    if row[WAITING] == NONE and has_room(c, writer, request):
        admit(c, writer, request, now)
    else:
        enqueue(c, writer, WAITING, request)


@compiled
def run_cluster(c: Cluster, num_at_start: int) -> None:
    """Serve every request; a closed loop starts with `num_at_start` of them, an open one with none.

    Fills `request_s` and the instances in `requests`.
    """
    for instance in range(len(c.instances)):
        clock, budget = c.instance_s[instance], c.instances[instance, BUDGET]
        clock[FULL_S] = prefill_s(c, instance, budget, 0.0)
        clock[FULL_PAIR_S] = prefill_s(c, instance, budget, 1.0) - clock[FULL_S]
    index, num = 0, len(c.requests)
    if c.scalars[IS_CLOSED_LOOP]:
        for request in range(num_at_start):
            schedule(c, 0.0, ARRIVE, request, 0)
        c.scalars[NEXT_REQUEST] = num_at_start
        index = num
    while index < num or c.scalars[NUM_EVENTS] > 0:
        now, kind, target, version = 0.0, ARRIVE, index, 0
        if c.scalars[NUM_EVENTS] > 0 and (
            index == num or c.request_s[index, ARRIVAL_S] > c.event_s[0]
        ):
            now, payload = c.event_s[0], c.events[0]
            c.scalars[NUM_EVENTS] = pop(c.event_s, c.event_number, c.events, c.scalars[NUM_EVENTS])
            kind, target, version = payload & 7, (payload >> 3) & 0xFFFFFFFF, payload >> 35
        else:
            now = c.request_s[index, ARRIVAL_S]
            index += 1
        if kind == ARRIVE:
            _arrive(c, target, now)
        elif kind == RELEASE:
            release(c, target, now)
        elif kind == PREPARED:
            queue_prompt(c, target, now)
        elif kind == WAKE:
            start_woken(c, target, now)
        elif kind == STEP_DONE:
            if c.instances[target, DEPTH] == 1 and version != (
                c.instances[target, VERSION] & 0xFFFFFF
            ):
                continue  # it ends earlier or later than was expected
            finish_chunks(c, target, now)
            if c.instances[target, DEPTH] == 1 or not c.instances[target, IS_STAGE_BUSY]:
                start_step(c, target, now)
        elif kind == STAGE_FREE:
            start_step(c, target, now)
        elif kind == KV_HERE:
            receive_kv(c, target, now)
        elif version == c.instances[target, VERSION] & 0xFFFFFF:
            finish_run(c, target, now)
