"""One machine under Splitwise's rules: continuous batching of whole prompts, with preemption.

Rules 1 to 3 of the reference's MODEL.md. Iterations of a batch that only decodes run as one event;
an arrival cuts it at the next iteration's end.
"""

from placement.simulation import splitwise_state as at
from placement.simulation.compiled import compiled, inlined
from placement.simulation.splitwise_state import (
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
    return bool(size == 0 or tokens + c.tasks[task, at.TOKENS] <= c.scalars[at.MAX_BATCH_TOKENS])


@inlined
def _select_batch(c: Cluster, machine: int) -> int:
    """Choose the next batch, into the list NEW_BATCH, in five passes; returns its size."""
    c.scalars[at.EPOCH] += 1
    epoch = c.scalars[at.EPOCH]
    scheduler = len(c.machines) - 1
    max_size, max_kv = c.scalars[at.MAX_BATCH_SIZE], c.machines[machine, at.MAX_KV]
    size, tokens, kv = 0, 0, c.machines[machine, at.KV]
    # A request is marked on its prompt task.
    for which in (at.PENDING, at.PROMPTS, at.BLOCKED_TASKS, at.BATCH, at.POOL):
        for index in range(c.machines[machine, at.LENGTHS + which]):
            task = c.lists[machine, which, index]
            if which == at.POOL:
                task = first_task(c, machine, task)
            if (
                which == at.PENDING
                and c.tasks[task, at.PREEMPTIONS] < c.scalars[at.MAX_PREEMPTIONS]
            ):
                break
            if size == max_size:
                break
            is_taken = c.tasks[task & ~1, at.MARK] == epoch
            if which == at.POOL and is_taken:
                continue
            if not _fits(c, size, tokens, task):
                break
            if is_taken:
                continue
            needs_memory = which not in (at.BLOCKED_TASKS, at.BATCH) and (
                c.tasks[task, at.STATE] != at.BLOCKED or which == at.PROMPTS
            )
            if needs_memory:
                if c.tasks[task, at.MEMORY] + kv > max_kv:
                    if which == at.PENDING:
                        continue
                    break
                kv += c.tasks[task, at.MEMORY]
            c.lists[scheduler, at.NEW_BATCH, size] = task
            size += 1
            tokens += c.tasks[task, at.TOKENS]
            c.tasks[task & ~1, at.MARK] = epoch
            # `is chosen` is a mark on the task itself; the prompt's doubles as the request's.
            c.tasks[task | 1, at.MARK] = epoch if task & 1 else -epoch
    c.machines[machine, at.BATCH_TOKENS] = tokens
    return size


@inlined
def _is_chosen(c: Cluster, task: int) -> bool:
    epoch = c.scalars[at.EPOCH]
    return bool(c.tasks[task | 1, at.MARK] == (epoch if task & 1 else -epoch))


@inlined
def _preempt_and_admit(c: Cluster, machine: int, size: int) -> None:
    index, scheduler = 0, len(c.machines) - 1
    while index < c.machines[machine, at.LENGTHS + at.BATCH]:
        task = c.lists[machine, at.BATCH, index]
        if _is_chosen(c, task):
            index += 1
            continue
        c.tasks[task, at.STATE] = at.BLOCKED
        c.tasks[task, at.IN_BATCH] = 0
        remove(c, machine, at.BATCH, task)
        add_pending(c, machine, task)
        append(c, machine, at.BLOCKED_TASKS, task)
    for index in range(size):
        task = c.lists[scheduler, at.NEW_BATCH, index]
        if c.tasks[task, at.IN_BATCH]:
            continue
        remove(c, machine, at.PENDING, task)
        remove(c, machine, at.BLOCKED_TASKS, task)
        if task & 1 == 0:
            remove(c, machine, at.PROMPTS, task)
            c.machines[machine, at.NUM_PROMPTS] += 1
        append(c, machine, at.BATCH, task)
        c.tasks[task, at.IN_BATCH] = 1
    for index in range(c.machines[machine, at.LENGTHS + at.POOL]):
        task = first_task(c, machine, c.lists[machine, at.POOL, index])
        if not c.tasks[task, at.IN_BATCH]:
            c.tasks[task, at.PREEMPTIONS] += 1


@compiled
def start_iteration(c: Cluster, machine: int, now: float) -> None:
    """Choose a batch and run it for as long as nothing in it ends; a mixed machine may go home."""
    _preempt_and_admit(c, machine, _select_batch(c, machine))
    state = c.machines[machine]
    length = c.machines[machine, at.LENGTHS + at.BATCH]
    if length == 0:
        if c.machines[machine, at.LENGTHS + at.POOL] == 0 and state[at.IS_MIXED]:
            state[at.IS_MIXED] = 0
            remove(c, len(c.machines) - 1, at.POOL_MIXED, machine)
            append(c, len(c.machines) - 1, state[at.HOME], machine)
        return
    num_tokens, iterations = 0, c.tasks[c.lists[machine, at.BATCH, 0], at.GOAL]
    for index in range(length):
        task = c.lists[machine, at.BATCH, index]
        num_tokens += c.tasks[task, at.TOKENS]
        iterations = min(iterations, c.tasks[task, at.GOAL] - c.tasks[task, at.MADE])
    curve = 1 if state[at.NUM_PROMPTS] > 0 else 2
    duration = iteration_s(c, machine, curve, num_tokens)
    if 0 < state[at.NUM_PROMPTS] < length:
        duration *= MIXED_SLOWDOWN
    if state[at.NUM_PROMPTS] > 0:
        iterations = 1
    for index in range(length):
        task = c.lists[machine, at.BATCH, index]
        c.tasks[task, at.MAKING] = iterations
        if c.tasks[task, at.STATE] == at.QUEUED:
            state[at.KV] += c.tasks[task, at.MEMORY]
            c.tasks[task & ~1, at.HELD] += c.tasks[task, at.MEMORY]
        c.tasks[task, at.STATE] = at.RUNNING
    state[at.ITERATIONS] = iterations
    c.machine_s[machine, at.ITERATION_S] = duration
    _schedule_end(c, machine, now, duration * iterations)


@compiled
def _schedule_end(c: Cluster, machine: int, now: float, delay: float) -> None:
    state = c.machines[machine]
    state[at.VERSION] += 1
    c.machine_s[machine, at.ITERATION_END] = now + delay
    schedule(c, now + delay, at.ITERATION | (machine << 2) | (state[at.VERSION] << 32))


@compiled
def cut_iterations(c: Cluster, machine: int, now: float) -> None:
    """End a decoding batch's run at the next iteration's end."""
    state, clock = c.machines[machine], c.machine_s[machine]
    if state[at.IS_PAUSING] or state[at.NUM_PROMPTS] > 0:
        return
    state[at.IS_PAUSING] = 1
    duration = clock[at.ITERATION_S]
    elapsed = now - (clock[at.ITERATION_END] - duration * state[at.ITERATIONS])
    state[at.ITERATIONS] = int(elapsed // duration) + 1
    for index in range(c.machines[machine, at.LENGTHS + at.BATCH]):
        c.tasks[c.lists[machine, at.BATCH, index], at.MAKING] = state[at.ITERATIONS]
    _schedule_end(c, machine, now, duration * state[at.ITERATIONS] - elapsed)


@compiled
def receive(c: Cluster, machine: int, task: int, now: float) -> None:
    """A task arrives at its machine."""
    c.tasks[task, at.STATE] = at.QUEUED
    add_to_pool(c, machine, task >> 1)
    add_pending(c, machine, task)
    if task & 1 == 0:
        append(c, machine, at.PROMPTS, task)
    state = c.machines[machine]
    length = c.machines[machine, at.LENGTHS + at.BATCH]
    if length == 0:
        if state[at.KV] + c.tasks[task, at.MEMORY] <= state[at.MAX_KV]:
            start_iteration(c, machine, now)
        return
    tokens, most = c.tasks[task, at.TOKENS], c.scalars[at.MAX_BATCH_TOKENS]
    prompt_tokens = state[at.BATCH_TOKENS] - (length - state[at.NUM_PROMPTS])
    has_room = length < c.scalars[at.MAX_BATCH_SIZE] and state[at.BATCH_TOKENS] + tokens <= most
    preempts = task & 1 == 0 and state[at.NUM_PROMPTS] < length and prompt_tokens + tokens <= most
    if has_room or preempts:
        cut_iterations(c, machine, now)


@inlined
def notice_departure(c: Cluster, machine: int, now: float) -> None:
    """KV has left this machine: what was blocked by memory may start."""
    if c.machines[machine, at.LENGTHS + at.PENDING] == 0:
        return
    state, task = c.machines[machine], c.lists[machine, at.PENDING, 0]
    length = c.machines[machine, at.LENGTHS + at.BATCH]
    if length == 0:
        if state[at.KV] + c.tasks[task, at.MEMORY] <= state[at.MAX_KV]:
            start_iteration(c, machine, now)
    elif (
        length < c.scalars[at.MAX_BATCH_SIZE]
        and state[at.BATCH_TOKENS] < c.scalars[at.MAX_BATCH_TOKENS]
    ):
        cut_iterations(c, machine, now)


@inlined
def count_iterations(c: Cluster, machine: int) -> None:
    """The iterations under way have ended: every task has made its tokens."""
    c.machine_s[machine, at.BUSY] += (
        c.machine_s[machine, at.ITERATION_S] * c.machines[machine, at.ITERATIONS]
    )
    for index in range(c.machines[machine, at.LENGTHS + at.BATCH]):
        task = c.lists[machine, at.BATCH, index]
        c.tasks[task, at.MADE] += c.tasks[task, at.MAKING]
