"""Our router and the event loop: who reads and who decodes (`router.policy`), in what order.

The decode side's blocks for prompt and answer are promised before the prompt is read; a request
waits there, first come first served, while they are not free.
"""

from pdserve.domain import kv_demand, pair_cost
from placement.simulation import pdserve_state as at
from placement.simulation.compiled import compiled, inlined
from placement.simulation.event_heap import pop
from placement.simulation.pdserve_shared import steal
from placement.simulation.pdserve_state import (
    NEVER,
    NONE,
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
            clock[at.TOLD_FIXED_S],
            clock[at.TOLD_PROMPT_S],
            clock[at.TOLD_PAIR_S],
            row[at.BUDGET],
            row[at.DEPTH],
            row[at.UNREAD] + tokens,
            clock[at.UNREAD_PAIRS] + pairs,
        )
    )


@inlined
def _is_late(c: Cluster, reader: int) -> bool:
    """Whether what is ahead at a reader takes longer than a request may wait."""
    longest = c.rates[at.MAX_WAIT_S]
    return bool(longest > 0.0 and _read_s(c, reader, 0, 0.0) > longest)


@inlined
def _step_s(c: Cluster, writer: int, prompt: int, now: float) -> float:
    """A step of the batch that a request joins: all who were sent there, by the tokens they have.

    The router has counted what it passed on to clients.
    """
    row, clock = c.instances[writer], c.instance_s[writer]
    context = row[at.CONTEXT] + row[at.ASSIGNED_TOKENS] + prompt
    if row[at.ACTIVE] > 0:
        context += row[at.ACTIVE] * (step_under_way(c, writer, now) - 1)
    return float(
        _answer_step_s(
            clock[at.TOLD_FIXED_S],
            clock[at.TOLD_ANSWER_S],
            clock[at.TOLD_CONTEXT_S],
            row[at.DEPTH],
            row[at.ASSIGNED] + 1,
            context,
        )
    )


@inlined
def _choose_pair(c: Cluster, request: int, now: float) -> bool:
    """`router.policy.LeastCost`; returns whether the request would wait too long everywhere.

    Who writes and reads reads its own prompts only; who only writes has them read by who only
    reads. Instances are looked at in their order, so that ties go to the smallest numbers.
    """
    prompt, counts = c.requests[request, at.PROMPT], c.scalars[at.COUNTS_REQUESTS]
    pairs = num_pairs(0, prompt)
    reader, of_reader, reader_s = NONE, _reader_rank(True, NEVER), NEVER
    for instance in range(len(c.instances)):
        row = c.instances[instance]
        if row[at.READS] and not row[at.WRITES]:
            read_s = _read_s(c, instance, prompt, pairs)
            cost = float(row[at.ASSIGNED]) if counts else read_s
            rank = _reader_rank(_is_late(c, instance), cost)
            if reader == NONE or rank < of_reader:
                reader, of_reader, reader_s = instance, rank, read_s
    max_tokens = c.requests[request, at.OUTPUT] * c.rates[at.MAX_TOKENS_FACTOR]
    needed = c.requests[request, at.WRITER_BLOCKS]
    best, of_best = NONE, _pair_rank(True, True, NEVER, 0)
    for writer in range(len(c.instances)):
        row = c.instances[writer]
        if not row[at.WRITES] or needed > row[at.NUM_BLOCKS]:
            continue
        is_late, read_s = of_reader[0], reader_s
        if row[at.READS]:
            is_late, read_s = _is_late(c, writer), _read_s(c, writer, prompt, pairs)
        cost = float(row[at.ASSIGNED])
        if not counts:
            ttft_s = _first_token_s(read_s, not row[at.READS])
            cost = _answer_s(ttft_s, max_tokens, _step_s(c, writer, prompt, now))
        free = row[at.NUM_BLOCKS] - row[at.ASSIGNED_BLOCKS] - needed
        is_full = free < 0 or row[at.ASSIGNED] >= row[at.MAX_ACTIVE]
        in_pair = _pair_rank(is_late, is_full, cost, free)
        if best == NONE or in_pair < of_best:
            best, of_best = writer, in_pair
    c.requests[request, at.WRITER] = best
    c.requests[request, at.READER] = best if c.instances[best, at.READS] else reader
    return bool(of_best[0])


@inlined
def _is_refused(c: Cluster, request: int, is_late: bool) -> bool:
    """The router's limits for new requests; see `router.dispatch.DispatchLimits`."""
    limit = c.scalars[at.MAX_UNREAD_REQUESTS]
    if is_late or (limit > 0 and c.scalars[at.NUM_UNREAD_REQUESTS] >= limit):
        return True
    wait_s = _read_s(c, c.requests[request, at.READER], 0, 0.0)
    c.rates[at.LONGEST_WAIT_S] = max(c.rates[at.LONGEST_WAIT_S], wait_s)
    return False


@inlined
def _arrive(c: Cluster, request: int, now: float) -> None:
    c.request_s[request, at.ARRIVAL_S] = now
    c.request_s[request, at.DEADLINE_S] += now  # which held the class's promise
    prompt = c.requests[request, at.PROMPT]
    max_tokens = int(c.requests[request, at.OUTPUT] * c.rates[at.MAX_TOKENS_FACTOR] + 0.5)
    c.requests[request, at.WRITER_BLOCKS] = num_blocks(c, _num_answer_kv_tokens(prompt, max_tokens))
    c.requests[request, at.READER_BLOCKS] = num_blocks(c, prompt)
    is_late = _choose_pair(c, request, now)
    if _is_refused(c, request, is_late):
        c.scalars[at.NUM_REFUSED] += 1
        c.request_s[request, at.FIRST_S], c.request_s[request, at.END_S] = NEVER, NEVER
        c.requests[request, at.READER], c.requests[request, at.WRITER] = NONE, NONE
        if c.scalars[at.IS_CLOSED_LOOP] and c.scalars[at.NEXT_REQUEST] < len(c.requests):
            schedule(c, now, at.ARRIVE, c.scalars[at.NEXT_REQUEST], 0)
            c.scalars[at.NEXT_REQUEST] += 1
        return
    reader, writer = c.requests[request, at.READER], c.requests[request, at.WRITER]
    c.scalars[at.NUM_UNREAD_REQUESTS] += 1
    c.instances[reader, at.UNREAD] += prompt
    c.instance_s[reader, at.UNREAD_PAIRS] += num_pairs(0, prompt)
    steal(c, writer, now)
    if reader != writer:
        c.instances[reader, at.ASSIGNED] += 1
    row = c.instances[writer]
    row[at.ASSIGNED] += 1
    row[at.ASSIGNED_TOKENS] += prompt
    row[at.ASSIGNED_BLOCKS] += c.requests[request, at.WRITER_BLOCKS]
    if row[at.WAITING] == NONE and has_room(c, writer, request):
        admit(c, writer, request, now)
    else:
        enqueue(c, writer, at.WAITING, request)


@compiled
def run_cluster(c: Cluster, num_at_start: int) -> None:
    """Serve every request; a closed loop starts with `num_at_start` of them, an open one with none.

    Fills `request_s` and the instances in `requests`.
    """
    index, num = 0, len(c.requests)
    if c.scalars[at.IS_CLOSED_LOOP]:
        for request in range(num_at_start):
            schedule(c, 0.0, at.ARRIVE, request, 0)
        c.scalars[at.NEXT_REQUEST] = num_at_start
        index = num
    while index < num or c.scalars[at.NUM_EVENTS] > 0:
        now, kind, target, version = 0.0, at.ARRIVE, index, 0
        if c.scalars[at.NUM_EVENTS] > 0 and (
            index == num or c.request_s[index, at.ARRIVAL_S] > c.event_s[0]
        ):
            now, payload = c.event_s[0], c.events[0]
            c.scalars[at.NUM_EVENTS] = pop(
                c.event_s, c.event_number, c.events, c.scalars[at.NUM_EVENTS]
            )
            kind, target, version = payload & 7, (payload >> 3) & 0xFFFFFFFF, payload >> 35
        else:
            now = c.request_s[index, at.ARRIVAL_S]
            index += 1
        if kind == at.ARRIVE:
            _arrive(c, target, now)
        elif kind == at.RELEASE:
            release(c, target, now)
        elif kind == at.PREPARED:
            queue_prompt(c, target, now)
        elif kind == at.WAKE:
            start_woken(c, target, now)
        elif kind == at.STEP_DONE:
            if c.instances[target, at.DEPTH] == 1 and version != (
                c.instances[target, at.VERSION] & 0xFFFFFF
            ):
                continue  # it ends earlier or later than was expected
            finish_chunks(c, target, now)
            if c.instances[target, at.DEPTH] == 1 or not c.instances[target, at.IS_STAGE_BUSY]:
                start_step(c, target, now)
        elif kind == at.STAGE_FREE:
            start_step(c, target, now)
        elif kind == at.KV_HERE:
            receive_kv(c, target, now)
        elif version == c.instances[target, at.VERSION] & 0xFFFFFF:
            finish_run(c, target, now)
