"""A closed loop of clients against one instance, over a `LatencyGrid`.

Each of `concurrency` clients sends its next request when the last one ended. The planner's
simulator knows only our own batching, so these engines' rules, with preemption and one frontend
process for all tokens, stand here; `predict_by_planner` checks one against the other. The rules:

- VLLM: decodes first, the rest of the token budget goes to prompt chunks; both in one step.
- SGLANG: waiting prompts go first, in steps of their own; decodes wait.
- TRTLLM: whole prompts beside decodes in one step, admitted only with room for all their output.
"""

from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pdserve.engine.kernel_cache import stamp_of, use_cache
from placement.latency import LatencyGrid

VLLM, SGLANG, TRTLLM = 0, 1, 2
Floats = NDArray[np.float64]


def grid_arrays(grid: LatencyGrid) -> tuple[Any, ...]:
    """The grid as a plain tuple that compiled code takes."""
    return (
        np.array(
            [
                grid.fixed_s,
                grid.prefill_fixed_s,
                grid.prompt_s,
                grid.prompt_token_s,
                grid.token_s,
                grid.reply_s,
            ]
        ),
        grid.tokens,
        grid.linear_s,
        grid.chunks,
        grid.lengths,
        grid.pair_s,
        grid.decodes,
        grid.contexts,
        grid.decode_s,
    )


def _kept(function: Any) -> Any:
    return use_cache(numba.njit(function), stamp_of([Path(__file__)]))


@_kept
def _cell(axis, value):  # type: ignore[no-untyped-def]
    value = max(value, axis[0])
    lower = min(np.searchsorted(axis, value, side="right") - 1, len(axis) - 2)
    return lower, (value - axis[lower]) / (axis[lower + 1] - axis[lower])


@_kept
def _plane(xs, ys, values, x, y):  # type: ignore[no-untyped-def]
    i, u = _cell(xs, x)
    j, v = _cell(ys, y)
    low = values[i, j] + (values[i, j + 1] - values[i, j]) * v
    high = values[i + 1, j] + (values[i + 1, j + 1] - values[i + 1, j]) * v
    return low + (high - low) * u


@_kept
def step_s(grid, chunk, pairs, decodes, context_sum):  # type: ignore[no-untyped-def]
    """`LatencyGrid.step_s`, compiled."""
    scalars, tokens, linear, chunks, lengths, pair_s, batch, contexts, decode = grid
    i, u = _cell(tokens, float(chunk + decodes))
    time = scalars[0] + linear[i] + (linear[i + 1] - linear[i]) * u
    if chunk > 0:
        length = 2.0 * pairs / chunk - 1.0
        time += scalars[1] + pairs * _plane(chunks, lengths, pair_s, float(chunk), length)
    if decodes > 0:
        time += _plane(batch, contexts, decode, float(decodes), context_sum / decodes)
    return time


@_kept
def serve(grid, rule, limits, prompts, cached, outputs, concurrency):  # type: ignore[no-untyped-def]
    """TTFT and TPOT (seconds) of each request of one colocated instance.

    limits: step token budget, KV capacity in tokens, most requests in a batch, most prompts
    started in one step. `cached` of each prompt's tokens are found in the prefix cache. One
    frontend process handles, first come first served, new requests and every token sent.
    """
    budget, capacity, max_batch, max_prompts = limits
    count = len(prompts)
    sent = np.zeros(count)
    ready = np.full(count, 1e30)  # when the engine may first see it
    first = np.full(count, -1.0)
    ended = np.zeros(count)
    done = np.zeros(count, np.int64)  # prompt tokens computed or found
    made = np.zeros(count, np.int64)  # tokens sent
    need = prompts.copy()  # prompt tokens to compute, grows when preempted
    waiting = np.zeros(count * 4 + 16, np.int64)
    head, tail = 0, 0
    running = np.zeros(count, np.int64)
    num_running = 0
    scalars = grid[0]
    token_s, late = scalars[4], scalars[5]
    next_request = min(concurrency, count)
    frontend = 0.0  # when it is free again
    passed = 0  # requests that went through the frontend
    for r in range(next_request):
        waiting[tail] = r
        tail += 1
    now = 0.0
    used = 0.0
    finished = 0
    while finished < count:
        while passed < next_request and sent[passed] <= now + 1e-12:
            frontend = max(frontend, sent[passed])
            frontend += scalars[2] + scalars[3] * prompts[passed]
            ready[passed] = frontend
            passed += 1
        # What this step prefills.
        decodes, context_sum = 0, 0.0
        for i in range(num_running):
            r = running[i]
            if done[r] >= need[r]:
                decodes += 1
                context_sum += prompts[r] + made[r]
        chunk, pairs = 0, 0.0
        room = budget - (decodes if rule != SGLANG else 0)
        for i in range(num_running):
            r = running[i]
            if done[r] < need[r] and room > 0:
                take = min(room, need[r] - done[r])
                pairs += take * done[r] + take * (take + 1) / 2
                chunk += take
                room -= take
                done[r] += take
        started = 0
        while head < tail and room > 0 and num_running < max_batch and started < max_prompts:
            r = waiting[head]
            if ready[r] > now + 1e-12:
                break
            found = cached[r] if made[r] == 0 else 0
            take = need[r] - found
            reserve = float(need[r])
            if rule == TRTLLM:
                reserve = float(prompts[r] + outputs[r])
                if take > room and chunk + decodes > 0:
                    break
            elif rule == SGLANG:
                reserve = need[r] + 0.0
                ahead = 0.0
                for i in range(num_running):
                    ahead += 0.5 * (outputs[running[i]] - made[running[i]])
                if num_running > 0 and used + reserve + ahead + 0.5 * outputs[r] > capacity:
                    break
                take = min(take, room)
            else:
                take = min(take, room)
            if used + reserve > capacity and num_running > 0:
                break
            used += reserve
            pairs += take * found + take * (take + 1) / 2
            chunk += take
            room -= take
            done[r] = found + take
            running[num_running] = r
            num_running += 1
            started += 1
            head += 1
        if chunk + decodes == 0:
            soonest = sent[passed] if passed < next_request else 1e30
            for i in range(head, tail):
                soonest = min(soonest, ready[waiting[i]])
            now = max(now, soonest)
            continue
        if rule == SGLANG and chunk > 0:
            decodes, context_sum = 0, 0.0
        # How many equal steps may be taken at once.
        steps = 1
        if chunk == 0:
            steps = 1 << 30
            for i in range(num_running):
                steps = min(steps, outputs[running[i]] - made[running[i]])
            middle = context_sum + decodes * (steps - 1) / 2.0
            each = step_s(grid, 0, 0.0, decodes, middle)
            soonest = sent[passed] if passed < next_request else 1e30
            if head < tail and ready[waiting[head]] > now:
                soonest = min(soonest, ready[waiting[head]])
            if soonest < now + each * steps:
                steps = min(steps, max(int((soonest - now) / each) + 1, 1))
            if rule != TRTLLM:
                left = int((capacity - used) / max(decodes, 1))
                steps = max(1, min(steps, left))
            elapsed = steps * step_s(
                grid, 0, 0.0, decodes, context_sum + decodes * (steps - 1) / 2.0
            )
        else:
            elapsed = step_s(grid, chunk, pairs, decodes, context_sum)
        now += elapsed
        while passed < next_request and sent[passed] <= now + 1e-12:
            frontend = max(frontend, sent[passed])
            frontend += scalars[2] + scalars[3] * prompts[passed]
            ready[passed] = frontend
            passed += 1
        # Who got tokens, who ended.
        sending = 0
        for i in range(num_running):
            r = running[i]
            if done[r] >= need[r] and (first[r] < 0.0 or chunk == 0 or rule != SGLANG):
                sending += 1
        frontend = max(frontend + steps * sending * token_s, now + sending * token_s)
        seen = frontend + late if token_s > 0.0 else now + late
        keep = 0
        for i in range(num_running):
            r = running[i]
            is_done = False
            if done[r] >= need[r]:
                fresh = need[r] > 0 and first[r] < 0.0
                resumed = False
                if fresh:
                    first[r] = seen
                    made[r] = 1
                elif chunk > 0 and rule == SGLANG:
                    resumed = True  # its decode waited for the prompts
                else:
                    made[r] += steps
                    if rule != TRTLLM:
                        used += steps
                if not resumed and made[r] >= outputs[r]:
                    is_done = True
            if is_done:
                ended[r] = seen
                finished += 1
                used -= prompts[r] + outputs[r] if rule == TRTLLM else prompts[r] + made[r] - 1
                if next_request < count:
                    sent[next_request] = seen
                    waiting[tail] = next_request
                    tail += 1
                    next_request += 1
            else:
                running[keep] = r
                keep += 1
        num_running = keep
        if rule != TRTLLM:
            while used + num_running > capacity and num_running > 1:
                # Preempt the youngest: its tokens are computed again.
                num_running -= 1
                r = running[num_running]
                used -= prompts[r] + max(made[r] - 1, 0) if done[r] >= need[r] else need[r]
                need[r] = prompts[r] + made[r]
                done[r] = 0
                if head > 0:
                    head -= 1
                    waiting[head] = r
                else:
                    for i in range(tail, 0, -1):
                        waiting[i] = waiting[i - 1]
                    waiting[0] = r
                    tail += 1
    ttft = first - sent
    tpot = (ended - first) / np.maximum(outputs - 1, 1)
    return ttft, tpot
