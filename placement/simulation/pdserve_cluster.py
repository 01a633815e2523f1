"""Our router and the event loop: who reads and who decodes (`router.policy`), in what order.

The decode side's blocks for prompt and answer are promised before the prompt is read; a request
waits there, first come first served, while they are not free.
"""

from pdserve.domain import kv_demand, pair_cost
from placement.simulation.compiled import compiled, inlined
from placement.simulation.event_heap import pop
from placement.simulation.pdserve_shared import steal
from placement.simulation.pdserve_state import (
    ACTIVE,
    ARRIVAL_S,
    ARRIVE,
    ASSIGNED,
    ASSIGNED_BLOCKS,
    ASSIGNED_TOKENS,
    BUDGET,
    CONTEXT,
    COUNTS_REQUESTS,
    DEADLINE_S,
    DEPTH,
    END_S,
    FIRST_S,
    IS_CLOSED_LOOP,
    IS_STAGE_BUSY,
    KV_HERE,
    LONGEST_WAIT_S,
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
    TOLD_ANSWER_S,
    TOLD_CONTEXT_S,
    TOLD_FIXED_S,
    TOLD_PAIR_S,
    TOLD_PROMPT_S,
    UNREAD,
    UNREAD_PAIRS,
    VERSION,
    WAITING,
    WAKE,
    WRITER,
    WRITER_BLOCKS,
    WRITES,
    Cluster,
    enqueue,
    num_blocks,
    num_pairs,
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

_num_answer_kv_tokens = inlined(kv_demand.num_answer_kv_tokens)
_reading_s = inlined(pair_cost.reading_s)
_answer_step_s = inlined(pair_cost.answer_step_s)
_first_token_s = inlined(pair_cost.first_token_s)
_answer_s = inlined(pair_cost.answer_s)
_reader_rank = inlined(pair_cost.reader_rank)
_pair_rank = inlined(pair_cost.pair_rank)


@compiled
def _read_s(c: Cluster, reader: int, tokens: int, pairs: float) -> float:
    """Time to read what was sent to a reader, and `tokens` more, as the router predicts it."""
    row, clock = c.instances[reader], c.instance_s[reader]
    return float(
        _reading_s(
            clock[TOLD_FIXED_S],
            clock[TOLD_PROMPT_S],
            clock[TOLD_PAIR_S],
            row[BUDGET],
            row[DEPTH],
            row[UNREAD] + tokens,
            clock[UNREAD_PAIRS] + pairs,
        )
    )


@inlined
def _is_late(c: Cluster, reader: int) -> bool:
    """Whether what is ahead at a reader takes longer than a request may wait."""
    longest = c.rates[MAX_WAIT_S]
    return bool(longest > 0.0 and _read_s(c, reader, 0, 0.0) > longest)


@inlined
def _step_s(c: Cluster, writer: int, prompt: int, now: float) -> float:
    """A step of the batch that a request joins: all who were sent there, by the tokens they have.

    The router has counted what it passed on to clients.
    """
    row, clock = c.instances[writer], c.instance_s[writer]
    context = row[CONTEXT] + row[ASSIGNED_TOKENS] + prompt
    if row[ACTIVE] > 0:
        context += row[ACTIVE] * (step_under_way(c, writer, now) - 1)
    return float(
        _answer_step_s(
            clock[TOLD_FIXED_S],
            clock[TOLD_ANSWER_S],
            clock[TOLD_CONTEXT_S],
            row[DEPTH],
            row[ASSIGNED] + 1,
            context,
        )
    )


@inlined
def _choose_pair(c: Cluster, request: int, now: float) -> bool:
    """`router.policy.LeastCost`; returns whether the request would wait too long everywhere.

    Who writes and reads reads its own prompts only; who only writes has them read by who only
    reads. Instances are looked at in their order, so that ties go to the smallest numbers.
    """
    prompt, counts = c.requests[request, PROMPT], c.scalars[COUNTS_REQUESTS]
    pairs = num_pairs(0, prompt)
    reader, of_reader, reader_s = NONE, _reader_rank(True, NEVER), NEVER
    for instance in range(len(c.instances)):
        row = c.instances[instance]
        if row[READS] and not row[WRITES]:
            read_s = _read_s(c, instance, prompt, pairs)
            cost = float(row[ASSIGNED]) if counts else read_s
            rank = _reader_rank(_is_late(c, instance), cost)
            if reader == NONE or rank < of_reader:
                reader, of_reader, reader_s = instance, rank, read_s
    max_tokens = c.requests[request, OUTPUT] * c.rates[MAX_TOKENS_FACTOR]
    needed = c.requests[request, WRITER_BLOCKS]
    best, of_best = NONE, _pair_rank(True, True, NEVER, 0)
    for writer in range(len(c.instances)):
        row = c.instances[writer]
        if not row[WRITES] or needed > row[NUM_BLOCKS]:
            continue
        is_late, read_s = of_reader[0], reader_s
        if row[READS]:
            is_late, read_s = _is_late(c, writer), _read_s(c, writer, prompt, pairs)
        cost = float(row[ASSIGNED])
        if not counts:
            ttft_s = _first_token_s(read_s, not row[READS])
            cost = _answer_s(ttft_s, max_tokens, _step_s(c, writer, prompt, now))
        free = row[NUM_BLOCKS] - row[ASSIGNED_BLOCKS] - needed
        is_full = free < 0 or row[ASSIGNED] >= row[MAX_ACTIVE]
        in_pair = _pair_rank(is_late, is_full, cost, free)
        if best == NONE or in_pair < of_best:
            best, of_best = writer, in_pair
    c.requests[request, WRITER] = best
    c.requests[request, READER] = best if c.instances[best, READS] else reader
    return bool(of_best[0])


@inlined
def _is_refused(c: Cluster, request: int, is_late: bool) -> bool:
    """The router's limits for new requests; see `router.dispatch.DispatchLimits`."""
    limit = c.scalars[MAX_UNREAD_REQUESTS]
    if is_late or (limit > 0 and c.scalars[NUM_UNREAD_REQUESTS] >= limit):
        return True
    wait_s = _read_s(c, c.requests[request, READER], 0, 0.0)
    c.rates[LONGEST_WAIT_S] = max(c.rates[LONGEST_WAIT_S], wait_s)
    return False


@inlined
def _arrive(c: Cluster, request: int, now: float) -> None:
    c.request_s[request, ARRIVAL_S] = now
    c.request_s[request, DEADLINE_S] += now  # which held the class's promise
    prompt = c.requests[request, PROMPT]
    max_tokens = int(c.requests[request, OUTPUT] * c.rates[MAX_TOKENS_FACTOR] + 0.5)
    c.requests[request, WRITER_BLOCKS] = num_blocks(c, _num_answer_kv_tokens(prompt, max_tokens))
    c.requests[request, READER_BLOCKS] = num_blocks(c, prompt)
    is_late = _choose_pair(c, request, now)
    if _is_refused(c, request, is_late):
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
    if reader != writer:
        c.instances[reader, ASSIGNED] += 1
    row = c.instances[writer]
    row[ASSIGNED] += 1
    row[ASSIGNED_TOKENS] += prompt
    row[ASSIGNED_BLOCKS] += c.requests[request, WRITER_BLOCKS]
    if row[WAITING] == NONE and has_room(c, writer, request):
        admit(c, writer, request, now)
    else:
        enqueue(c, writer, WAITING, request)


@compiled
def run_cluster(c: Cluster, num_at_start: int) -> None:
    """Serve every request; a closed loop starts with `num_at_start` of them, an open one with none.

    Fills `request_s` and the instances in `requests`.
    """
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
