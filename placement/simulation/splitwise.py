"""Rules splitwise: pools turned into arrays once, then any number of traces simulated."""

from collections.abc import Sequence

import numpy as np

from pdserve.domain.errors import LocalFault
from placement.simulation import splitwise_state as state
from placement.simulation.splitwise_cluster import run_cluster
from placement.simulation.timing import SplitwiseTiming
from placement.simulation.trace import Times, Trace
from placement.simulation.values import Pool, PoolRole, Scheduler, SplitwiseOptions

SCHEDULERS = {
    Scheduler.MIXED_POOL: state.MIXED_POOL,
    Scheduler.TOKEN_JSQ: state.TOKEN_JSQ,
    Scheduler.KV_JSQ: state.KV_JSQ,
    Scheduler.KV_TOKEN_JSQ: state.KV_TOKEN_JSQ,
}
RETRY_S = 1.0
FASTER_LINK = 10
"""kv_token_jsq pretends to overlap transfers by so much more bandwidth."""


class SplitwiseCluster:
    """Machines of Splitwise's simulator: prefill pools hold its prompt machines, decode pools its
    token machines; token_jsq uses all alike."""

    def __init__(self, pools: Sequence[Pool], options: SplitwiseOptions) -> None:
        self._pools = [pool for pool in pools for _ in range(pool.replicas)]
        self._options = options
        roles = {pool.role for pool in pools}
        default = Scheduler.TOKEN_JSQ if roles == {PoolRole.COLOCATED} else Scheduler.MIXED_POOL
        self._scheduler = options.scheduler or default
        is_alike = self._scheduler is Scheduler.TOKEN_JSQ
        if not is_alike and roles != {PoolRole.PREFILL, PoolRole.DECODE}:
            raise LocalFault(
                f"rules splitwise: scheduler {self._scheduler} needs prefill and decode pools; "
                f"got {', '.join(sorted(roles))}"
            )
        if any(pool.pp != 1 for pool in pools):
            raise LocalFault("rules splitwise: pp must be 1; its simulator has no pipelines")
        is_prompt = np.array([is_alike or p.role == PoolRole.PREFILL for p in self._pools])
        self._homes = np.where(is_prompt, state.POOL_PROMPT, state.POOL_TOKEN)
        self._timings = [_timing(pool) for pool in self._pools]
        if len({(t.weight_bytes, t.kv_bytes_per_token) for t in self._timings}) > 1:
            raise LocalFault("rules splitwise: all pools must serve the same model")

    def run(self, trace: Trace) -> Times:
        """Simulate all requests to their end."""
        self._check(trace)
        cluster = self._new_cluster(trace)
        run_cluster(cluster)
        first_s, end_s = cluster.request_s[:, state.FIRST_S], cluster.request_s[:, state.END_S]
        prompts = cluster.tasks[0::2]
        return Times(
            arrival_s=trace.arrival_s,
            ttft_s=first_s - trace.arrival_s,
            # The reference divides by all tokens, not by those after the first.
            tpot_s=(end_s - first_s) / trace.outputs,
            e2e_s=end_s - trace.arrival_s,
            prefill=prompts[:, state.PROMPT_AT].copy(),
            decode=prompts[:, state.TOKEN_AT].copy(),
            busy_s=cluster.machine_s[:-1, state.BUSY].copy(),
        )

    def _check(self, trace: Trace) -> None:
        if len(trace) == 0:
            return
        if (least := int(trace.outputs.min())) < 1:
            raise LocalFault(
                f"request {int(trace.outputs.argmin())}: output_tokens must be at least 1 under "
                f"rules splitwise; got {least}"
            )
        most = min(timing.kv_tokens for timing in self._timings)
        totals = trace.prompts + trace.outputs
        if (longest := int(totals.max())) > most:
            raise LocalFault(
                f"request {int(totals.argmax())}: {longest} tokens exceed the {most} that fit into "
                "one machine's memory"
            )

    def _new_cluster(self, trace: Trace) -> state.Cluster:
        num, num_machines, options = len(trace), len(self._pools), self._options
        tasks = np.zeros((2 * num, state.NUM_TASK_COLUMNS), np.int64)
        prompt, token = tasks[0::2], tasks[1::2]
        kv_bytes = int(self._timings[0].kv_bytes_per_token)
        prompt[:, state.TOKENS], token[:, state.TOKENS] = trace.prompts, 1
        prompt[:, state.GOAL], token[:, state.GOAL] = 1, trace.outputs - 1
        prompt[:, state.MEMORY] = (trace.prompts + 1) * kv_bytes
        token[:, state.MEMORY] = (trace.outputs - 1) * kv_bytes
        machines = np.zeros((num_machines + 1, state.NUM_MACHINE_COLUMNS), np.int64)
        machines[:-1, state.KV] = [t.weight_bytes for t in self._timings]
        machines[:-1, state.PROMISED] = machines[:-1, state.KV]
        machines[:-1, state.MAX_KV] = [t.memory_bytes for t in self._timings]
        machines[:-1, state.HOME] = self._homes
        lists = np.empty((num_machines + 1, state.NUM_LISTS, self._list_size(num)), np.int64)
        for group in (state.POOL_PROMPT, state.POOL_TOKEN):
            members = np.flatnonzero(self._homes == group)
            lists[-1, group, : len(members)] = members
            machines[-1, state.LENGTHS + group] = len(members)
        most = max(len(t.tokens) for t in self._timings)
        machine_s = np.zeros((num_machines + 1, state.CURVES + 3 * most))
        machine_s[-1, state.RETRY_S] = RETRY_S
        for number, timing in enumerate(self._timings):
            curves = np.concatenate([timing.tokens, timing.prompt_s, timing.token_s])
            machine_s[number, state.CURVES : state.CURVES + len(curves)] = curves
            machines[number, state.NUM_KNOTS] = len(timing.tokens)
        bandwidth = options.transfer_gib_per_s * 2**30
        if self._scheduler is Scheduler.KV_TOKEN_JSQ:
            bandwidth *= FASTER_LINK
        scalars = np.zeros(state.NUM_SCALARS, np.int64)
        scalars[state.MAX_BATCH_SIZE] = options.max_batch_size
        scalars[state.MAX_BATCH_TOKENS] = options.max_batch_tokens
        scalars[state.MAX_PREEMPTIONS] = options.max_preemptions
        scalars[state.MAX_QUEUED_TOKENS] = options.prompt_max_pending_batch_tokens
        scalars[state.SCHEDULER] = SCHEDULERS[self._scheduler]
        request_s = np.zeros((num, 4))
        request_s[:, state.ARRIVAL_S] = trace.arrival_s
        request_s[:, state.TRANSFER_S] = trace.prompts * kv_bytes / bandwidth
        # Each request is one arrival, at most one transfer under way, and, with its two tasks and
        # its transfer's end, three cuts of an iteration, each of which leaves a void event.
        num_events = 8 * num + num_machines + 16
        return state.Cluster(
            tasks=tasks,
            request_s=request_s,
            machines=machines,
            machine_s=machine_s,
            lists=lists,
            event_s=np.empty(num_events),
            events=np.empty(num_events, np.int64),
            scalars=scalars,
        )

    def _list_size(self, num_requests: int) -> int:
        return max(2 * num_requests + 1, self._options.max_batch_size + 1, len(self._pools))


def _timing(pool: Pool) -> SplitwiseTiming:
    if not isinstance(pool.timing, SplitwiseTiming):
        raise LocalFault("rules splitwise need a latency profile in Splitwise's form (CSV)")
    return pool.timing
