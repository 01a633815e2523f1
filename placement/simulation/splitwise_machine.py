"""One machine under Splitwise's rules: continuous batching of whole prompts, with preemption.

Rules 1 to 3 of the reference's MODEL.md. Iterations of a batch that only decodes run as one event;
an arrival cuts it at the next iteration's end.
"""

from placement.simulation.compiled import compiled, inlined
from placement.simulation.splitwise_state import (
    BATCH,
    BATCH_TOKENS,
    BLOCKED,
    BLOCKED_TASKS,
    BUSY,
    EPOCH,
    GOAL,
    HELD,
    HOME,
    IN_BATCH,
    IS_MIXED,
    IS_PAUSING,
    ITERATION,
    ITERATION_END,
    ITERATION_S,
    ITERATIONS,
    KV,
    LENGTHS,
    MADE,
    MAKING,
    MARK,
    MAX_BATCH_SIZE,
    MAX_BATCH_TOKENS,
    MAX_KV,
    MAX_PREEMPTIONS,
    MEMORY,
    NEW_BATCH,
    NUM_PROMPTS,
    PENDING,
    POOL,
    POOL_MIXED,
    PREEMPTIONS,
    PROMPTS,
    QUEUED,
    RUNNING,
    STATE,
    TOKENS,
    VERSION,
    Cluster,
    add_pending,
    add_to_pool,
    append,
    first_task,
    iteration_s,
    remove,
    schedule,
)

MIXED_SLOWDOWN = 1.1
"""A batch of prompts and tokens takes this much longer than its prompt time."""


@inlined
def _fits(c: Cluster, size: int, tokens: int, task: int) -> bool:
    return bool(size == 0 or tokens + c.tasks[task, TOKENS] <= c.scalars[MAX_BATCH_TOKENS])


@inlined
def _select_batch(c: Cluster, machine: int) -> int:
    """Choose the next batch, into the list NEW_BATCH, in five passes; returns its size."""
    c.scalars[EPOCH] += 1
    epoch = c.scalars[EPOCH]
    scheduler = len(c.machines) - 1
    max_size, max_kv = c.scalars[MAX_BATCH_SIZE], c.machines[machine, MAX_KV]
    size, tokens, kv = 0, 0, c.machines[machine, KV]
    # A request is marked on its prompt task.
    for which in (PENDING, PROMPTS, BLOCKED_TASKS, BATCH, POOL):
        for index in range(c.machines[machine, LENGTHS + which]):
            task = c.lists[machine, which, index]
            if which == POOL:
                task = first_task(c, machine, task)
            if which == PENDING and c.tasks[task, PREEMPTIONS] < c.scalars[MAX_PREEMPTIONS]:
                break
            if size == max_size:
                break
            is_taken = c.tasks[task & ~1, MARK] == epoch
            if which == POOL and is_taken:
                continue
            if not _fits(c, size, tokens, task):
                break
            if is_taken:
                continue
            needs_memory = which not in (BLOCKED_TASKS, BATCH) and (
                c.tasks[task, STATE] != BLOCKED or which == PROMPTS
            )
            if needs_memory:
                if c.tasks[task, MEMORY] + kv > max_kv:
                    if which == PENDING:
                        continue
                    break
                kv += c.tasks[task, MEMORY]
            c.lists[scheduler, NEW_BATCH, size] = task
            size += 1
            tokens += c.tasks[task, TOKENS]
            c.tasks[task & ~1, MARK] = epoch
            # `is chosen` is a mark on the task itself; the prompt's doubles as the request's.
            c.tasks[task | 1, MARK] = epoch if task & 1 else -epoch
    c.machines[machine, BATCH_TOKENS] = tokens
    return size


@inlined
def _is_chosen(c: Cluster, task: int) -> bool:
    epoch = c.scalars[EPOCH]
    return bool(c.tasks[task | 1, MARK] == (epoch if task & 1 else -epoch))


@inlined
def _preempt_and_admit(c: Cluster, machine: int, size: int) -> None:
    index, scheduler = 0, len(c.machines) - 1
    while index < c.machines[machine, LENGTHS + BATCH]:
        task = c.lists[machine, BATCH, index]
        if _is_chosen(c, task):
            index += 1
            continue
        c.tasks[task, STATE] = BLOCKED
        c.tasks[task, IN_BATCH] = 0
        remove(c, machine, BATCH, task)
        add_pending(c, machine, task)
        append(c, machine, BLOCKED_TASKS, task)
    for index in range(size):
        task = c.lists[scheduler, NEW_BATCH, index]
        if c.tasks[task, IN_BATCH]:
            continue
        remove(c, machine, PENDING, task)
        remove(c, machine, BLOCKED_TASKS, task)
        if task & 1 == 0:
            remove(c, machine, PROMPTS, task)
            c.machines[machine, NUM_PROMPTS] += 1
        append(c, machine, BATCH, task)
        c.tasks[task, IN_BATCH] = 1
    for index in range(c.machines[machine, LENGTHS + POOL]):
        task = first_task(c, machine, c.lists[machine, POOL, index])
        if not c.tasks[task, IN_BATCH]:
            c.tasks[task, PREEMPTIONS] += 1


@compiled
def start_iteration(c: Cluster, machine: int, now: float) -> None:
    """Choose a batch and run it for as long as nothing in it ends; a mixed machine may go home."""
    _preempt_and_admit(c, machine, _select_batch(c, machine))
    state = c.machines[machine]
    length = c.machines[machine, LENGTHS + BATCH]
    if length == 0:
        if c.machines[machine, LENGTHS + POOL] == 0 and state[IS_MIXED]:
            state[IS_MIXED] = 0
            remove(c, len(c.machines) - 1, POOL_MIXED, machine)
            append(c, len(c.machines) - 1, state[HOME], machine)
        return
    num_tokens, iterations = 0, c.tasks[c.lists[machine, BATCH, 0], GOAL]
    for index in range(length):
        task = c.lists[machine, BATCH, index]
        num_tokens += c.tasks[task, TOKENS]
        iterations = min(iterations, c.tasks[task, GOAL] - c.tasks[task, MADE])
    curve = 1 if state[NUM_PROMPTS] > 0 else 2
    duration = iteration_s(c, machine, curve, num_tokens)
    if 0 < state[NUM_PROMPTS] < length:
        duration *= MIXED_SLOWDOWN
    if state[NUM_PROMPTS] > 0:
        iterations = 1
    for index in range(length):
        task = c.lists[machine, BATCH, index]
        c.tasks[task, MAKING] = iterations
        if c.tasks[task, STATE] == QUEUED:
            state[KV] += c.tasks[task, MEMORY]
            c.tasks[task & ~1, HELD] += c.tasks[task, MEMORY]
        c.tasks[task, STATE] = RUNNING
    state[ITERATIONS] = iterations
    c.machine_s[machine, ITERATION_S] = duration
    _schedule_end(c, machine, now, duration * iterations)


@compiled
def _schedule_end(c: Cluster, machine: int, now: float, delay: float) -> None:
    state = c.machines[machine]
    state[VERSION] += 1
    c.machine_s[machine, ITERATION_END] = now + delay
    schedule(c, now + delay, ITERATION | (machine << 2) | (state[VERSION] << 32))


@compiled
def cut_iterations(c: Cluster, machine: int, now: float) -> None:
    """End a decoding batch's run at the next iteration's end."""
    state, clock = c.machines[machine], c.machine_s[machine]
    if state[IS_PAUSING] or state[NUM_PROMPTS] > 0:
        return
    state[IS_PAUSING] = 1
    duration = clock[ITERATION_S]
    elapsed = now - (clock[ITERATION_END] - duration * state[ITERATIONS])
    state[ITERATIONS] = int(elapsed // duration) + 1
    for index in range(c.machines[machine, LENGTHS + BATCH]):
        c.tasks[c.lists[machine, BATCH, index], MAKING] = state[ITERATIONS]
    _schedule_end(c, machine, now, duration * state[ITERATIONS] - elapsed)


@compiled
def receive(c: Cluster, machine: int, task: int, now: float) -> None:
    """A task arrives at its machine."""
    c.tasks[task, STATE] = QUEUED
    add_to_pool(c, machine, task >> 1)
    add_pending(c, machine, task)
    if task & 1 == 0:
        append(c, machine, PROMPTS, task)
    state = c.machines[machine]
    length = c.machines[machine, LENGTHS + BATCH]
    if length == 0:
        if state[KV] + c.tasks[task, MEMORY] <= state[MAX_KV]:
            start_iteration(c, machine, now)
        return
    tokens, most = c.tasks[task, TOKENS], c.scalars[MAX_BATCH_TOKENS]
    prompt_tokens = state[BATCH_TOKENS] - (length - state[NUM_PROMPTS])
    has_room = length < c.scalars[MAX_BATCH_SIZE] and state[BATCH_TOKENS] + tokens <= most
    preempts = task & 1 == 0 and state[NUM_PROMPTS] < length and prompt_tokens + tokens <= most
    if has_room or preempts:
        cut_iterations(c, machine, now)


@inlined
def notice_departure(c: Cluster, machine: int, now: float) -> None:
    """KV has left this machine: what was blocked by memory may start."""
    if c.machines[machine, LENGTHS + PENDING] == 0:
        return
    state, task = c.machines[machine], c.lists[machine, PENDING, 0]
    length = c.machines[machine, LENGTHS + BATCH]
    if length == 0:
        if state[KV] + c.tasks[task, MEMORY] <= state[MAX_KV]:
            start_iteration(c, machine, now)
    elif length < c.scalars[MAX_BATCH_SIZE] and state[BATCH_TOKENS] < c.scalars[MAX_BATCH_TOKENS]:
        cut_iterations(c, machine, now)


@inlined
def count_iterations(c: Cluster, machine: int) -> None:
    """The iterations under way have ended: every task has made its tokens."""
    c.machine_s[machine, BUSY] += (
        c.machine_s[machine, ITERATION_S] * c.machines[machine, ITERATIONS]
    )
    for index in range(c.machines[machine, LENGTHS + BATCH]):
        task = c.lists[machine, BATCH, index]
        c.tasks[task, MADE] += c.tasks[task, MAKING]
