"""Splitwise's schedulers, KV transfers and event loop: rules 3 to 6 of its MODEL.md."""

from placement.simulation import splitwise_state as at
from placement.simulation.compiled import compiled, inlined
from placement.simulation.splitwise_machine import (
    count_iterations,
    notice_departure,
    receive,
    start_iteration,
)
from placement.simulation.splitwise_state import (
    Cluster,
    append,
    drop_first_event,
    remove,
    schedule,
)

NONE = -1
POOL_LENGTH = -1
"""Asks `_least` for the number of requests on a machine instead of one of its columns."""


@inlined
def _load(c: Cluster, machine: int, column: int) -> int:
    if column == POOL_LENGTH:
        return int(c.machines[machine, at.LENGTHS + at.POOL])
    return int(c.machines[machine, column])


@compiled
def _least(c: Cluster, group: int, column: int) -> int:
    """The first machine of a group with the least load, NONE of an empty group."""
    if c.machines[-1, at.LENGTHS + group] == 0:
        return NONE
    best = c.lists[-1, group, 0]
    for index in range(1, c.machines[-1, at.LENGTHS + group]):
        machine = c.lists[-1, group, index]
        if _load(c, machine, column) < _load(c, best, column):
            best = machine
    return int(best)


@inlined
def _least_of_all(c: Cluster) -> int:
    best = NONE
    for group in (at.POOL_PROMPT, at.POOL_MIXED, at.POOL_TOKEN):
        machine = _least(c, group, at.PENDING_TOKENS)
        if machine == NONE:
            continue
        if (
            best == NONE
            or c.machines[machine, at.PENDING_TOKENS] < c.machines[best, at.PENDING_TOKENS]
        ):
            best = machine
    return best


@inlined
def _assign_mixed(c: Cluster, request: int) -> None:
    """The mixed pool: take from the other side when one's own is full; see rule 6."""
    prompt, token = 2 * request, 2 * request + 1
    needed = c.tasks[prompt, at.MEMORY] + c.tasks[token, at.MEMORY]
    prompt_at, token_at = NONE, NONE
    for group in (at.POOL_PROMPT, at.POOL_MIXED):
        machine = _least(c, group, at.PENDING_TOKENS)
        if machine == NONE or prompt_at != NONE:
            continue
        queued = c.machines[machine, at.PENDING_TOKENS] + c.tasks[prompt, at.TOKENS]
        if (
            c.machines[machine, at.LENGTHS + at.PENDING] == 0
            or queued <= c.scalars[at.MAX_QUEUED_TOKENS]
        ):
            prompt_at = machine
    for group in (at.POOL_TOKEN, at.POOL_MIXED):
        machine = _least(c, group, at.PROMISED)
        if machine == NONE or token_at != NONE:
            continue
        if c.machines[machine, at.PROMISED] + needed < c.machines[machine, at.MAX_KV]:
            token_at = machine
    if prompt_at == NONE and c.machines[-1, at.LENGTHS + at.POOL_TOKEN] > 0:
        prompt_at = _least(c, at.POOL_TOKEN, at.PENDING_TOKENS)
        _mix(c, at.POOL_TOKEN, prompt_at)
    if token_at == NONE and c.machines[-1, at.LENGTHS + at.POOL_PROMPT] > 0:
        token_at = _least(c, at.POOL_PROMPT, at.PROMISED)
        _mix(c, at.POOL_PROMPT, token_at)
    if prompt_at == NONE or token_at == NONE:
        prompt_at = _least_of_all(c)
        token_at = prompt_at
    if prompt_at != token_at:
        c.machines[prompt_at, at.PROMISED] += c.tasks[prompt, at.MEMORY]
    c.machines[token_at, at.PROMISED] += needed
    c.machines[prompt_at, at.PENDING_TOKENS] += c.tasks[prompt, at.TOKENS]
    c.machines[token_at, at.PENDING_TOKENS] += 1
    c.tasks[2 * request, at.PROMPT_AT], c.tasks[2 * request, at.TOKEN_AT] = prompt_at, token_at


@inlined
def _mix(c: Cluster, group: int, machine: int) -> None:
    remove(c, len(c.machines) - 1, group, machine)
    append(c, len(c.machines) - 1, at.POOL_MIXED, machine)
    c.machines[machine, at.IS_MIXED] = 1


@inlined
def _assign(c: Cluster, request: int) -> None:
    scheduler = c.scalars[at.SCHEDULER]
    if scheduler == at.MIXED_POOL:
        _assign_mixed(c, request)
    elif scheduler == at.TOKEN_JSQ:
        machine = _least(c, at.POOL_PROMPT, at.PENDING_TOKENS)  # which then holds all machines
        c.machines[machine, at.PENDING_TOKENS] += c.tasks[2 * request, at.TOKENS] + 1
        c.tasks[2 * request, at.PROMPT_AT], c.tasks[2 * request, at.TOKEN_AT] = machine, machine
    else:
        column = POOL_LENGTH if scheduler == at.KV_JSQ else at.PENDING_TOKENS
        c.tasks[2 * request, at.PROMPT_AT] = _least(c, at.POOL_PROMPT, column)
        c.tasks[2 * request, at.TOKEN_AT] = _least(c, at.POOL_TOKEN, column)


@compiled
def _arrive(c: Cluster, request: int, now: float) -> None:
    _assign(c, request)
    prompt_at = c.tasks[2 * request, at.PROMPT_AT]
    receive(c, prompt_at, 2 * request, now)
    if c.tasks[2 * request, at.TOKEN_AT] == prompt_at:
        receive(c, prompt_at, 2 * request + 1, now)


@compiled
def _start_transfer(c: Cluster, request: int, now: float) -> None:
    """Move the KV if the target has room, else try again later."""
    target = c.machines[c.tasks[2 * request, at.TOKEN_AT]]
    if target[at.KV] + c.tasks[2 * request, at.HELD] <= target[at.MAX_KV]:
        target[at.KV] += c.tasks[2 * request, at.HELD]
        schedule(c, now + c.request_s[request, at.TRANSFER_S], at.TRANSFERRED | (request << 2))
    else:
        schedule(c, now + c.machine_s[-1, at.RETRY_S], at.RETRY | (request << 2))


@inlined
def _end_transfer(c: Cluster, request: int, now: float) -> None:
    source, target = c.tasks[2 * request, at.PROMPT_AT], c.tasks[2 * request, at.TOKEN_AT]
    c.machines[source, at.KV] -= c.tasks[2 * request, at.HELD]
    c.machines[source, at.PROMISED] -= c.tasks[2 * request, at.HELD]
    receive(c, target, 2 * request + 1, now)
    notice_departure(c, source, now)


@inlined
def _complete(c: Cluster, machine: int, task: int, now: float) -> None:
    """A task has made all its tokens and leaves the batch."""
    request, state = task >> 1, c.machines[machine]
    c.tasks[task, at.STATE] = at.DONE
    c.tasks[task, at.IN_BATCH] = 0
    remove(c, machine, at.BATCH, task)
    if task & 1:
        state[at.PENDING_TOKENS] -= 1
        state[at.KV] -= c.tasks[2 * request, at.HELD]
        state[at.PROMISED] -= c.tasks[2 * request, at.HELD]
        c.tasks[2 * request, at.HELD] = 0
        remove(c, machine, at.POOL, request)
        c.request_s[request, at.END_S] = now
        return
    state[at.PENDING_TOKENS] -= c.tasks[task, at.TOKENS]
    state[at.NUM_PROMPTS] -= 1
    c.request_s[request, at.FIRST_S] = now
    if c.tasks[2 * request, at.TOKEN_AT] != machine:
        remove(c, machine, at.POOL, request)
        _start_transfer(c, request, now)


@inlined
def _end_iterations(c: Cluster, machine: int, now: float) -> None:
    count_iterations(c, machine)
    complete, num_complete = c.lists[-1, at.COMPLETE], 0
    for index in range(c.machines[machine, at.LENGTHS + at.BATCH]):
        task = c.lists[machine, at.BATCH, index]
        if c.tasks[task, at.MADE] == c.tasks[task, at.GOAL]:
            complete[num_complete] = task
            num_complete += 1
    for index in range(num_complete):
        _complete(c, machine, complete[index], now)
    c.machines[machine, at.IS_PAUSING] = 0
    start_iteration(c, machine, now)


@compiled
def run_cluster(c: Cluster) -> None:
    """Serve every request; fills the times in `request_s` and the machines in `tasks`."""
    for request in range(len(c.request_s)):
        if (
            c.request_s[request, at.ARRIVAL_S] == 0.0
        ):  # the reference runs what has no delay at once
            _arrive(c, request, 0.0)
        else:
            schedule(c, c.request_s[request, at.ARRIVAL_S], at.ARRIVAL | (request << 2))
    while c.scalars[at.NUM_EVENTS] > 0:
        now, payload = c.event_s[0], c.events[0]
        drop_first_event(c)
        kind = payload & 3
        target = (payload >> 2) & 0x3FFFFFFF
        if kind == at.ITERATION:
            if payload >> 32 == c.machines[target, at.VERSION]:
                _end_iterations(c, target, now)
        elif kind == at.ARRIVAL:
            _arrive(c, target, now)
        elif kind == at.TRANSFERRED:
            _end_transfer(c, target, now)
        else:
            _start_transfer(c, target, now)
