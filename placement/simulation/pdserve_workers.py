"""Our workers: prompts in chunks under a token budget, continuous batching, blocks held to the end.

A decode batch that does not change runs as one event, its steps an arithmetic series; a request
that joins cuts the run at the next step's end. An instance of both roles computes chunks and decode
tokens in one step while there is a prompt to read.
"""

from placement.simulation.compiled import compiled, inlined
from placement.simulation.event_heap import pop_int, push_int
from placement.simulation.pdserve_shared import (
    count_busy_readers,
    count_busy_writers,
    cut_run,
    schedule_run_end,
    slowdown,
    steal,
)
from placement.simulation.pdserve_state import (
    ACTIVE,
    ADMITTED,
    ARRIVE,
    ASSIGNED,
    ASSIGNED_BLOCKS,
    ASSIGNED_TOKENS,
    BUDGET,
    BUSY,
    BUSY_HANDOFF_S,
    BY_DEADLINE,
    CONTEXT,
    DEADLINE_S,
    DEPTH,
    END_S,
    FIRST_S,
    FREE_BLOCKS,
    HANDOFF_S,
    HIT_TOKENS,
    IN_FLIGHT,
    IS_CLOSED_LOOP,
    IS_CUT,
    IS_SHARED,
    IS_STAGE_BUSY,
    JOINING,
    KV_HERE,
    LINK_IN_FREE,
    LINK_LATENCY,
    LINK_OUT_FREE,
    MASK,
    MAX_ACTIVE,
    MAX_PROMPTS_IN_STEP,
    NEXT,
    NEXT_REQUEST,
    NONE,
    NUM_UNREAD_REQUESTS,
    OLDEST,
    OUTPUT,
    OWED_S,
    PREPARED,
    PROMPT,
    PROMPT_S,
    PROMPT_TOKEN_S,
    QUEUE,
    READ,
    READER,
    READER_BLOCKS,
    READS,
    RELEASE,
    RUN_FIRST,
    RUN_GROWTH,
    RUN_START,
    RUN_STEPS,
    SECONDS_PER_TOKEN,
    SENT,
    SHARED_S,
    SHIFT,
    SLOWED,
    STAGE_FREE,
    STAGES,
    STEP,
    STEP_DONE,
    STEP_END,
    UNREAD,
    UNREAD_PAIRS,
    VERSION,
    WAITING,
    WAKE,
    WAKE_S,
    WRITER,
    WRITER_BLOCKS,
    WRITES,
    Cluster,
    context_s,
    decode_s,
    dequeue,
    enqueue,
    num_pairs,
    prefill_s,
    schedule,
)
from placement.simulation.prefix_cache import cached_tokens, keep_prefix


@compiled
def ask_reader(c: Cluster, request: int, now: float) -> None:
    """Blocks are promised: the reader takes the prompt on once its host has prepared it."""
    clock = c.instance_s[c.requests[request, READER]]
    seconds = clock[PROMPT_S] + clock[PROMPT_TOKEN_S] * c.requests[request, PROMPT]
    if seconds > 0.0:
        schedule(c, now + seconds, PREPARED, request, 0)
    else:
        queue_prompt(c, request, now)


@inlined
def has_room(c: Cluster, writer: int, request: int) -> bool:
    """Whether a decode side can promise blocks for prompt and answer, and a place in its batch."""
    row = c.instances[writer]
    return bool(
        c.requests[request, WRITER_BLOCKS] <= row[FREE_BLOCKS] and row[ADMITTED] < row[MAX_ACTIVE]
    )


@compiled
def admit(c: Cluster, writer: int, request: int, now: float) -> None:
    """Promise blocks and place; only then is a reader asked."""
    row = c.instances[writer]
    row[FREE_BLOCKS] -= c.requests[request, WRITER_BLOCKS]
    row[ADMITTED] += 1
    ask_reader(c, request, now)


@compiled
def queue_prompt(c: Cluster, request: int, now: float) -> None:
    """The prompt waits to be read."""
    reader = c.requests[request, READER]
    row = c.instances[reader]
    enqueue(c, reader, QUEUE, request)
    if c.scalars[BY_DEADLINE] and row[QUEUE + 2] > 1:
        _sort_in(c, reader, request)
    wake(c, reader, now)


@compiled
def wake(c: Cluster, instance: int, now: float) -> None:
    """There is something to do: an idle instance begins after all that happens in this moment."""
    row = c.instances[instance]
    if row[WRITES] and row[RUN_STEPS] > 0:
        cut_run(c, instance, now)
    elif row[WRITES] or not row[IS_STAGE_BUSY]:
        schedule(c, now, WAKE, instance, 0)


@inlined
def start_woken(c: Cluster, instance: int, now: float) -> None:
    """An instance that was idle begins, unless it has begun in the meantime."""
    row = c.instances[instance]
    if row[WRITES]:
        if row[RUN_STEPS] == 0:
            start_run(c, instance, now)
    elif not row[IS_STAGE_BUSY]:
        start_step(c, instance, now)


@inlined
def _sort_in(c: Cluster, reader: int, request: int) -> None:
    """Move the last of the queue before the first with a later deadline."""
    row, deadline = c.instances[reader], c.request_s[request, DEADLINE_S]
    before, after = NONE, row[QUEUE]
    while after != request and c.request_s[after, DEADLINE_S] <= deadline:
        before = after
        after = c.requests[after, NEXT]
    if after == request:
        return
    last = after
    while c.requests[last, NEXT] != request:
        last = c.requests[last, NEXT]
    c.requests[last, NEXT] = NONE
    row[QUEUE + 1] = last
    c.requests[request, NEXT] = after
    if before == NONE:
        row[QUEUE] = request
    else:
        c.requests[before, NEXT] = request


@compiled
def _form_chunks(c: Cluster, instance: int, budget: int) -> tuple[int, float]:
    """Take what the next step reads from the queue; returns its tokens and pairs."""
    row = c.instances[instance]
    most = min(MAX_PROMPTS_IN_STEP, row[MAX_ACTIVE])
    ring = (row[OLDEST] + row[IN_FLIGHT]) % c.chunks.shape[1]
    chunks, count = c.chunks[instance, ring], 0
    tokens, pairs = 0, 0.0
    while row[QUEUE] != NONE and tokens < budget and count < most:
        request = row[QUEUE]
        if c.requests[request, READ] == 0:
            if not row[WRITES]:
                if c.requests[request, READER_BLOCKS] > row[FREE_BLOCKS]:
                    break
                row[FREE_BLOCKS] -= c.requests[request, READER_BLOCKS]
            cached = cached_tokens(c, instance, request)
            c.requests[request, READ] = cached
            c.scalars[HIT_TOKENS] += cached
        start = c.requests[request, READ]
        length = min(budget - tokens, c.requests[request, PROMPT] - start)
        c.requests[request, READ] = start + length
        tokens += length
        pairs += num_pairs(start, length)
        count += 1
        chunks[count, 0] = request
        chunks[count, 1] = start + length
        if start + length == c.requests[request, PROMPT]:
            dequeue(c, instance, QUEUE)
    chunks[0, 0] = count
    if count > 0:
        row[IN_FLIGHT] += 1
    return tokens, pairs


@compiled
def start_step(c: Cluster, instance: int, now: float) -> None:
    """A reader's first stage is free: form the next step and send it down the pipeline.

    As many steps as stages are under way at most; a step's end comes back here.
    """
    row, clock = c.instances[instance], c.instance_s[instance]
    tokens, pairs = 0, 0.0
    if row[IN_FLIGHT] < row[DEPTH]:
        tokens, pairs = _form_chunks(c, instance, row[BUDGET])
    was_busy, row[IS_STAGE_BUSY] = row[IS_STAGE_BUSY], tokens > 0
    if c.scalars[IS_SHARED] and row[IS_STAGE_BUSY] != was_busy:
        count_busy_readers(c, row[IS_STAGE_BUSY] - was_busy, now)
    if tokens == 0:
        return
    depth = row[DEPTH]
    stage_s = prefill_s(c, instance, tokens, pairs) / depth
    if not was_busy:
        stage_s += clock[WAKE_S]
    if c.scalars[IS_SHARED]:
        clock[SLOWED] = slowdown(c, instance)
        stage_s *= clock[SLOWED]
    end = now + stage_s
    clock[STEP_END] = end
    clock[BUSY] += stage_s
    if depth > 1:
        schedule(c, end, STAGE_FREE, instance, 0)
        for stage in range(1, depth):
            end = max(end, clock[STAGES + stage]) + stage_s
            clock[STAGES + stage] = end
    version = row[VERSION] & 0xFFFFFF if depth == 1 else 0
    schedule(c, end, STEP_DONE, instance, version)


@compiled
def finish_chunks(c: Cluster, instance: int, now: float) -> None:
    """The oldest step in flight has ended: send its KV on; who is read has its first token."""
    row = c.instances[instance]
    chunks = c.chunks[instance, row[OLDEST]]
    row[OLDEST] = (row[OLDEST] + 1) % c.chunks.shape[1]
    row[IN_FLIGHT] -= 1
    for entry in range(1, chunks[0, 0] + 1):
        request, end = chunks[entry, 0], chunks[entry, 1]
        writer = c.requests[request, WRITER]
        ready = now
        if writer != instance:
            ready = _send(c, instance, writer, end - c.requests[request, SENT], now)
            c.requests[request, SENT] = end
        if end < c.requests[request, PROMPT]:
            continue
        keep_prefix(c, instance, request)
        prompt = c.requests[request, PROMPT]
        c.scalars[NUM_UNREAD_REQUESTS] -= 1
        row[UNREAD] -= prompt
        if writer != instance:
            row[ASSIGNED] -= 1
        c.instance_s[instance, UNREAD_PAIRS] -= num_pairs(0, prompt)
        c.request_s[request, FIRST_S] = now + c.rates[HANDOFF_S]
        if c.instances[writer, RUN_STEPS] > 0:
            c.request_s[request, FIRST_S] += c.rates[BUSY_HANDOFF_S]
        if c.requests[request, OUTPUT] <= 1:
            if writer != instance:
                row[FREE_BLOCKS] += c.requests[request, READER_BLOCKS]
            c.instances[writer, ASSIGNED_TOKENS] -= prompt
            _finish(c, request, now, c.request_s[request, FIRST_S])
            continue
        c.instances[writer, ASSIGNED_TOKENS] += 1
        if writer == instance:
            enqueue(c, writer, JOINING, request)
        else:
            schedule(c, ready, KV_HERE, request, 0)


@inlined
def _send(c: Cluster, reader: int, writer: int, tokens: int, now: float) -> float:
    """Put KV on the reader's outgoing and the writer's incoming link; returns when it is there."""
    source, target = c.instance_s[reader], c.instance_s[writer]
    start = max(now, source[LINK_OUT_FREE], target[LINK_IN_FREE])
    end = start + tokens * max(source[SECONDS_PER_TOKEN], target[SECONDS_PER_TOKEN])
    source[LINK_OUT_FREE] = end
    target[LINK_IN_FREE] = end
    return float(end + max(source[LINK_LATENCY], target[LINK_LATENCY]))


@compiled
def _finish(c: Cluster, request: int, now: float, end: float) -> None:
    """Give the decode side's blocks to who waits for them; a closed loop sends the next request."""
    c.request_s[request, END_S] = end
    writer = c.requests[request, WRITER]
    row = c.instances[writer]
    row[ASSIGNED] -= 1
    row[ASSIGNED_BLOCKS] -= c.requests[request, WRITER_BLOCKS]
    row[ADMITTED] -= 1
    row[FREE_BLOCKS] += c.requests[request, WRITER_BLOCKS]
    if c.scalars[IS_CLOSED_LOOP] and c.scalars[NEXT_REQUEST] < len(c.requests):
        schedule(c, end, ARRIVE, c.scalars[NEXT_REQUEST], 0)
        c.scalars[NEXT_REQUEST] += 1
    if row[WAITING] != NONE:
        # Later in this moment: the caller is in the middle of a step's end.
        schedule(c, now, RELEASE, writer, 0)


@inlined
def release(c: Cluster, writer: int, now: float) -> None:
    """Admit who waits, first come first served."""
    row = c.instances[writer]
    while row[WAITING] != NONE:
        waiting = row[WAITING]
        if not has_room(c, writer, waiting):
            break
        dequeue(c, writer, WAITING)
        admit(c, writer, waiting, now)


@compiled
def receive_kv(c: Cluster, request: int, now: float) -> None:
    """All KV is on the decode side: the reader lets go, the request joins the next step."""
    reader, writer = c.requests[request, READER], c.requests[request, WRITER]
    c.instances[reader, FREE_BLOCKS] += c.requests[request, READER_BLOCKS]
    if c.instances[reader, QUEUE] != NONE:
        wake(c, reader, now)
    enqueue(c, writer, JOINING, request)
    steal(c, writer, now)
    if c.instances[writer, ACTIVE] < c.instances[writer, MAX_ACTIVE]:
        wake(c, writer, now)


@compiled
def start_run(c: Cluster, instance: int, now: float) -> None:
    """Form the batch and run it until it changes."""
    row, clock, heap = c.instances[instance], c.instance_s[instance], c.heap[instance]
    was_busy = row[RUN_STEPS] > 0
    while row[JOINING] != NONE and row[ACTIVE] < row[MAX_ACTIVE]:
        request = dequeue(c, instance, JOINING)
        last_step = row[STEP] + c.requests[request, OUTPUT] - 1
        push_int(heap, row[ACTIVE], (last_step << SHIFT) | request)
        row[ACTIVE] += 1
        row[CONTEXT] += c.requests[request, PROMPT] + 1
        row[ASSIGNED_TOKENS] -= c.requests[request, PROMPT] + 1
    size, tokens, pairs = row[ACTIVE], 0, 0.0
    depth = row[DEPTH]
    if row[READS] and row[QUEUE] != NONE:
        tokens, pairs = _form_chunks(c, instance, max(row[BUDGET] - size, 1))
    row[IS_CUT] = 0
    row[RUN_STEPS] = 0
    is_busy = size > 0 or tokens > 0
    if c.scalars[IS_SHARED] and is_busy != was_busy and not row[READS]:
        count_busy_writers(c, 1 if is_busy else -1, now)
    if not is_busy:
        return
    # With a pipeline, as many micro-batches as stages are under way; a round takes one's time.
    first, growth = 0.0, 0.0
    if size > 0:
        part = (size + depth - 1) // depth
        first = decode_s(c, instance, part, row[CONTEXT] / depth)
        growth = context_s(c, instance, part) * size / depth
    if tokens > 0:
        first += prefill_s(c, instance, tokens / depth, pairs / depth)
        if size > 0:
            first -= clock[SHARED_S]
        growth, steps = 0.0, 1
    else:
        steps = (heap[0] >> SHIFT) - row[STEP]
    if c.scalars[IS_SHARED]:
        slowed = slowdown(c, instance)
        first *= slowed
        growth *= slowed
    extra_s = clock[OWED_S] if was_busy else clock[WAKE_S]
    clock[OWED_S] = 0.0
    if extra_s > 0.0:
        first += extra_s
        growth, steps = 0.0, 1
    clock[RUN_START], clock[RUN_FIRST], clock[RUN_GROWTH] = now, first, growth
    schedule_run_end(c, instance, steps)


@compiled
def finish_run(c: Cluster, instance: int, now: float) -> None:
    """The steps of a run have ended: let go of what is complete and go on."""
    row, clock, heap = c.instances[instance], c.instance_s[instance], c.heap[instance]
    clock[BUSY] += now - clock[RUN_START]
    row[STEP] += row[RUN_STEPS]
    row[CONTEXT] += row[ACTIVE] * row[RUN_STEPS]
    while row[ACTIVE] > 0 and heap[0] >> SHIFT <= row[STEP]:
        request = heap[0] & MASK
        pop_int(heap, row[ACTIVE])
        row[ACTIVE] -= 1
        row[CONTEXT] -= c.requests[request, PROMPT] + c.requests[request, OUTPUT]
        _finish(c, request, now, now)
    if row[IN_FLIGHT] > 0:
        finish_chunks(c, instance, now)
    start_run(c, instance, now)
