"""Our workers: prompts in chunks under a token budget, continuous batching, blocks held to the end.

A decode batch that does not change runs as one event, its steps an arithmetic series; a request
that joins cuts the run at the next step's end. An instance of both roles computes chunks and decode
tokens in one step while there is a prompt to read.
"""

from placement.simulation import pdserve_state as at
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
    MASK,
    NONE,
    SHIFT,
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
    clock = c.instance_s[c.requests[request, at.READER]]
    seconds = clock[at.PROMPT_S] + clock[at.PROMPT_TOKEN_S] * c.requests[request, at.PROMPT]
    if seconds > 0.0:
        schedule(c, now + seconds, at.PREPARED, request, 0)
    else:
        queue_prompt(c, request, now)


@inlined
def has_room(c: Cluster, writer: int, request: int) -> bool:
    """Whether a decode side can promise blocks for prompt and answer, and a place in its batch."""
    row = c.instances[writer]
    return bool(
        c.requests[request, at.WRITER_BLOCKS] <= row[at.FREE_BLOCKS]
        and row[at.ADMITTED] < row[at.MAX_ACTIVE]
    )


@compiled
def admit(c: Cluster, writer: int, request: int, now: float) -> None:
    """Promise blocks and place; only then is a reader asked."""
    row = c.instances[writer]
    row[at.FREE_BLOCKS] -= c.requests[request, at.WRITER_BLOCKS]
    row[at.ADMITTED] += 1
    ask_reader(c, request, now)


@compiled
def queue_prompt(c: Cluster, request: int, now: float) -> None:
    """The prompt waits to be read."""
    reader = c.requests[request, at.READER]
    row = c.instances[reader]
    enqueue(c, reader, at.QUEUE, request)
    if c.scalars[at.BY_DEADLINE] and row[at.QUEUE + 2] > 1:
        _sort_in(c, reader, request)
    wake(c, reader, now)


@compiled
def wake(c: Cluster, instance: int, now: float) -> None:
    """There is something to do: an idle instance begins after all that happens in this moment."""
    row = c.instances[instance]
    if row[at.WRITES] and row[at.RUN_STEPS] > 0:
        cut_run(c, instance, now)
    elif row[at.WRITES] or not row[at.IS_STAGE_BUSY]:
        schedule(c, now, at.WAKE, instance, 0)


@inlined
def start_woken(c: Cluster, instance: int, now: float) -> None:
    """An instance that was idle begins, unless it has begun in the meantime."""
    row = c.instances[instance]
    if row[at.WRITES]:
        if row[at.RUN_STEPS] == 0:
            start_run(c, instance, now)
    elif not row[at.IS_STAGE_BUSY]:
        start_step(c, instance, now)


@inlined
def _sort_in(c: Cluster, reader: int, request: int) -> None:
    """Move the last of the queue before the first with a later deadline."""
    row, deadline = c.instances[reader], c.request_s[request, at.DEADLINE_S]
    before, after = NONE, row[at.QUEUE]
    while after != request and c.request_s[after, at.DEADLINE_S] <= deadline:
        before = after
        after = c.requests[after, at.NEXT]
    if after == request:
        return
    last = after
    while c.requests[last, at.NEXT] != request:
        last = c.requests[last, at.NEXT]
    c.requests[last, at.NEXT] = NONE
    row[at.QUEUE + 1] = last
    c.requests[request, at.NEXT] = after
    if before == NONE:
        row[at.QUEUE] = request
    else:
        c.requests[before, at.NEXT] = request


@compiled
def _form_chunks(c: Cluster, instance: int, budget: int) -> tuple[int, float]:
    """Take what the next step reads from the queue; returns its tokens and pairs."""
    row = c.instances[instance]
    most = min(at.MAX_PROMPTS_IN_STEP, row[at.MAX_ACTIVE])
    ring = (row[at.OLDEST] + row[at.IN_FLIGHT]) % c.chunks.shape[1]
    chunks, count = c.chunks[instance, ring], 0
    tokens, pairs = 0, 0.0
    while row[at.QUEUE] != NONE and tokens < budget and count < most:
        request = row[at.QUEUE]
        if c.requests[request, at.READ] == 0:
            if not row[at.WRITES]:
                if c.requests[request, at.READER_BLOCKS] > row[at.FREE_BLOCKS]:
                    break
                row[at.FREE_BLOCKS] -= c.requests[request, at.READER_BLOCKS]
            cached = cached_tokens(c, instance, request)
            c.requests[request, at.READ] = cached
            c.scalars[at.HIT_TOKENS] += cached
        start = c.requests[request, at.READ]
        length = min(budget - tokens, c.requests[request, at.PROMPT] - start)
        c.requests[request, at.READ] = start + length
        tokens += length
        pairs += num_pairs(start, length)
        count += 1
        chunks[count, 0] = request
        chunks[count, 1] = start + length
        if start + length == c.requests[request, at.PROMPT]:
            dequeue(c, instance, at.QUEUE)
    chunks[0, 0] = count
    if count > 0:
        row[at.IN_FLIGHT] += 1
    return tokens, pairs


@compiled
def start_step(c: Cluster, instance: int, now: float) -> None:
    """A reader's first stage is free: form the next step and send it down the pipeline.

    As many steps as stages are under way at most; a step's end comes back here.
    """
    row, clock = c.instances[instance], c.instance_s[instance]
    tokens, pairs = 0, 0.0
    if row[at.IN_FLIGHT] < row[at.DEPTH]:
        tokens, pairs = _form_chunks(c, instance, row[at.BUDGET])
    was_busy, row[at.IS_STAGE_BUSY] = row[at.IS_STAGE_BUSY], tokens > 0
    if c.scalars[at.IS_SHARED] and row[at.IS_STAGE_BUSY] != was_busy:
        count_busy_readers(c, row[at.IS_STAGE_BUSY] - was_busy, now)
    if tokens == 0:
        return
    depth = row[at.DEPTH]
    stage_s = prefill_s(c, instance, tokens, pairs) / depth
    if not was_busy:
        stage_s += clock[at.WAKE_S]
    if c.scalars[at.IS_SHARED]:
        clock[at.SLOWED] = slowdown(c, instance)
        stage_s *= clock[at.SLOWED]
    end = now + stage_s
    clock[at.STEP_END] = end
    clock[at.BUSY] += stage_s
    if depth > 1:
        schedule(c, end, at.STAGE_FREE, instance, 0)
        for stage in range(1, depth):
            end = max(end, clock[at.STAGES + stage]) + stage_s
            clock[at.STAGES + stage] = end
    version = row[at.VERSION] & 0xFFFFFF if depth == 1 else 0
    schedule(c, end, at.STEP_DONE, instance, version)


@compiled
def finish_chunks(c: Cluster, instance: int, now: float) -> None:
    """The oldest step in flight has ended: send its KV on; who is read has its first token."""
    row = c.instances[instance]
    chunks = c.chunks[instance, row[at.OLDEST]]
    row[at.OLDEST] = (row[at.OLDEST] + 1) % c.chunks.shape[1]
    row[at.IN_FLIGHT] -= 1
    for entry in range(1, chunks[0, 0] + 1):
        request, end = chunks[entry, 0], chunks[entry, 1]
        writer = c.requests[request, at.WRITER]
        ready = now
        if writer != instance:
            ready = _send(c, instance, writer, end - c.requests[request, at.SENT], now)
            c.requests[request, at.SENT] = end
        if end < c.requests[request, at.PROMPT]:
            continue
        keep_prefix(c, instance, request)
        prompt = c.requests[request, at.PROMPT]
        c.scalars[at.NUM_UNREAD_REQUESTS] -= 1
        row[at.UNREAD] -= prompt
        if writer != instance:
            row[at.ASSIGNED] -= 1
        c.instance_s[instance, at.UNREAD_PAIRS] -= num_pairs(0, prompt)
        c.request_s[request, at.FIRST_S] = now + c.rates[at.HANDOFF_S]
        if c.instances[writer, at.RUN_STEPS] > 0:
            c.request_s[request, at.FIRST_S] += c.rates[at.BUSY_HANDOFF_S]
        if c.requests[request, at.OUTPUT] <= 1:
            if writer != instance:
                row[at.FREE_BLOCKS] += c.requests[request, at.READER_BLOCKS]
            c.instances[writer, at.ASSIGNED_TOKENS] -= prompt
            _finish(c, request, now, c.request_s[request, at.FIRST_S])
            continue
        c.instances[writer, at.ASSIGNED_TOKENS] += 1
        if writer == instance:
            enqueue(c, writer, at.JOINING, request)
        else:
            schedule(c, ready, at.KV_HERE, request, 0)


@inlined
def _send(c: Cluster, reader: int, writer: int, tokens: int, now: float) -> float:
    """Put KV on the reader's outgoing and the writer's incoming link; returns when it is there."""
    source, target = c.instance_s[reader], c.instance_s[writer]
    start = max(now, source[at.LINK_OUT_FREE], target[at.LINK_IN_FREE])
    end = start + tokens * max(source[at.SECONDS_PER_TOKEN], target[at.SECONDS_PER_TOKEN])
    source[at.LINK_OUT_FREE] = end
    target[at.LINK_IN_FREE] = end
    return float(end + max(source[at.LINK_LATENCY], target[at.LINK_LATENCY]))


@compiled
def _finish(c: Cluster, request: int, now: float, end: float) -> None:
    """Give the decode side's blocks to who waits for them; a closed loop sends the next request."""
    c.request_s[request, at.END_S] = end
    writer = c.requests[request, at.WRITER]
    row = c.instances[writer]
    row[at.ASSIGNED] -= 1
    row[at.ASSIGNED_BLOCKS] -= c.requests[request, at.WRITER_BLOCKS]
    row[at.ADMITTED] -= 1
    row[at.FREE_BLOCKS] += c.requests[request, at.WRITER_BLOCKS]
    if c.scalars[at.IS_CLOSED_LOOP] and c.scalars[at.NEXT_REQUEST] < len(c.requests):
        schedule(c, end, at.ARRIVE, c.scalars[at.NEXT_REQUEST], 0)
        c.scalars[at.NEXT_REQUEST] += 1
    if row[at.WAITING] != NONE:
        # Later in this moment: the caller is in the middle of a step's end.
        schedule(c, now, at.RELEASE, writer, 0)


@inlined
def release(c: Cluster, writer: int, now: float) -> None:
    """Admit who waits, first come first served."""
    row = c.instances[writer]
    while row[at.WAITING] != NONE:
        waiting = row[at.WAITING]
        if not has_room(c, writer, waiting):
            break
        dequeue(c, writer, at.WAITING)
        admit(c, writer, waiting, now)


@compiled
def receive_kv(c: Cluster, request: int, now: float) -> None:
    """All KV is on the decode side: the reader lets go, the request joins the next step."""
    reader, writer = c.requests[request, at.READER], c.requests[request, at.WRITER]
    c.instances[reader, at.FREE_BLOCKS] += c.requests[request, at.READER_BLOCKS]
    if c.instances[reader, at.QUEUE] != NONE:
        wake(c, reader, now)
    enqueue(c, writer, at.JOINING, request)
    steal(c, writer, now)
    if c.instances[writer, at.ACTIVE] < c.instances[writer, at.MAX_ACTIVE]:
        wake(c, writer, now)


@compiled
def start_run(c: Cluster, instance: int, now: float) -> None:
    """Form the batch and run it until it changes."""
    row, clock, heap = c.instances[instance], c.instance_s[instance], c.heap[instance]
    was_busy = row[at.RUN_STEPS] > 0
    while row[at.JOINING] != NONE and row[at.ACTIVE] < row[at.MAX_ACTIVE]:
        request = dequeue(c, instance, at.JOINING)
        last_step = row[at.STEP] + c.requests[request, at.OUTPUT] - 1
        push_int(heap, row[at.ACTIVE], (last_step << SHIFT) | request)
        row[at.ACTIVE] += 1
        row[at.CONTEXT] += c.requests[request, at.PROMPT] + 1
        row[at.ASSIGNED_TOKENS] -= c.requests[request, at.PROMPT] + 1
    size, tokens, pairs = row[at.ACTIVE], 0, 0.0
    depth = row[at.DEPTH]
    if row[at.READS] and row[at.QUEUE] != NONE:
        tokens, pairs = _form_chunks(c, instance, max(row[at.BUDGET] - size, 1))
    row[at.IS_CUT] = 0
    row[at.RUN_STEPS] = 0
    is_busy = size > 0 or tokens > 0
    if c.scalars[at.IS_SHARED] and is_busy != was_busy and not row[at.READS]:
        count_busy_writers(c, 1 if is_busy else -1, now)
    if not is_busy:
        return
    # With a pipeline, as many micro-batches as stages are under way; a round takes one's time.
    first, growth = 0.0, 0.0
    if size > 0:
        part = (size + depth - 1) // depth
        first = decode_s(c, instance, part, row[at.CONTEXT] / depth)
        growth = context_s(c, instance, part) * size / depth
    if tokens > 0:
        first += prefill_s(c, instance, tokens / depth, pairs / depth)
        if size > 0:
            first -= clock[at.SHARED_S]
        growth, steps = 0.0, 1
    else:
        steps = (heap[0] >> SHIFT) - row[at.STEP]
    if c.scalars[at.IS_SHARED]:
        slowed = slowdown(c, instance)
        first *= slowed
        growth *= slowed
    extra_s = clock[at.OWED_S] if was_busy else clock[at.WAKE_S]
    clock[at.OWED_S] = 0.0
    if extra_s > 0.0:
        first += extra_s
        growth, steps = 0.0, 1
    clock[at.RUN_START], clock[at.RUN_FIRST], clock[at.RUN_GROWTH] = now, first, growth
    schedule_run_end(c, instance, steps)


@compiled
def finish_run(c: Cluster, instance: int, now: float) -> None:
    """The steps of a run have ended: let go of what is complete and go on."""
    row, clock, heap = c.instances[instance], c.instance_s[instance], c.heap[instance]
    clock[at.BUSY] += now - clock[at.RUN_START]
    row[at.STEP] += row[at.RUN_STEPS]
    row[at.CONTEXT] += row[at.ACTIVE] * row[at.RUN_STEPS]
    while row[at.ACTIVE] > 0 and heap[0] >> SHIFT <= row[at.STEP]:
        request = heap[0] & MASK
        pop_int(heap, row[at.ACTIVE])
        row[at.ACTIVE] -= 1
        row[at.CONTEXT] -= c.requests[request, at.PROMPT] + c.requests[request, at.OUTPUT]
        _finish(c, request, now, now)
    if row[at.IN_FLIGHT] > 0:
        finish_chunks(c, instance, now)
    start_run(c, instance, now)
