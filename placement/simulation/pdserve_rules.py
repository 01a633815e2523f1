"""Rules pdserve: pools turned into arrays once, then any number of traces simulated."""

from collections.abc import Sequence

import numpy as np

from pdserve.domain.errors import LocalFault
from pdserve.domain.kv_demand import num_answer_kv_tokens
from placement.fitting import TERMS
from placement.linear_steps import linear_steps
from placement.simulation import pdserve_state as state
from placement.simulation.pdserve_cluster import run_cluster
from placement.simulation.timing import at_sizes
from placement.simulation.trace import Floats, Ints, Times, Trace
from placement.simulation.values import PdserveOptions, Pool, PoolRole, can_serve

UNLIMITED_BLOCKS = 1 << 40
MIN_TABLE_SIZE = 64
STALE_EVENTS_PER_INSTANCE = 64
SCATTER_SEED = 0x5CA7


class PdserveCluster:
    """Any mix of prefill, decode and colocated pools behind one router."""

    def __init__(self, pools: Sequence[Pool], options: PdserveOptions) -> None:
        self._pools = [pool for pool in pools for _ in range(pool.replicas)]
        self._options = options
        roles = {pool.role for pool in self._pools}
        if not can_serve(roles):
            raise LocalFault(
                "pools must hold prefill and decode instances, or colocated ones; got "
                + (", ".join(sorted(roles)) or "none")
            )
        self._curves, self._layout = self._sample_timings()
        self._instances, self._instance_s = self._new_instances()

    def run(
        self, trace: Trace, *, ttft_s: Floats | None = None, concurrency: int | None = None
    ) -> Times:
        """Simulate. `ttft_s` is what each request was promised (for prefill order deadline).

        With `concurrency` the trace's arrivals do not count: so many requests are under way at
        any time, the next one is sent when one ends.
        """
        self._check(trace)
        cluster = self._new_cluster(trace, ttft_s, is_closed=concurrency is not None)
        run_cluster(cluster, min(concurrency or 0, len(trace)))
        times = cluster.request_s
        arrival_s = times[:, state.ARRIVAL_S].copy()
        first_s, end_s = times[:, state.FIRST_S], times[:, state.END_S]
        is_refused = np.isinf(end_s)
        num_gaps = np.maximum(trace.outputs - 1, 1)
        with np.errstate(invalid="ignore"):
            tpot_s = np.where(is_refused, np.inf, (end_s - first_s) / num_gaps)
        # KV may land and a step may end while the first token is still on its way.
        tpot_s = np.maximum(tpot_s, 0.0)
        factor = self._scatter(num_gaps)
        e2e_s = np.maximum(end_s, first_s) - arrival_s
        late_s = np.where(is_refused, 0.0, tpot_s) * (factor - 1) * num_gaps
        reader = cluster.requests[:, state.READER].copy()
        has_decoded = (trace.outputs > 1) & ~is_refused
        return Times(
            arrival_s=arrival_s,
            ttft_s=first_s - arrival_s,
            tpot_s=tpot_s * factor,
            e2e_s=e2e_s + late_s,
            prefill=reader,
            decode=np.where(has_decoded, cluster.requests[:, state.WRITER], state.NONE),
            busy_s=cluster.instance_s[:, state.BUSY].copy(),
            num_refused=int(is_refused.sum()),
            prefix_hit_tokens=int(cluster.scalars[state.HIT_TOKENS]),
            longest_wait_s=float(cluster.rates[state.LONGEST_WAIT_S]),
        )

    def _scatter(self, num_gaps: Ints) -> Floats:
        """What each TPOT is multiplied with, of mean 1; request i has the same luck in every run.

        It moves nobody else: steps of one time have it in common only in part.
        """
        options = self._options
        variance = options.answer_scatter**2 + options.step_scatter**2 / num_gaps
        if not variance.any():
            return np.ones(len(num_gaps))
        luck = np.random.default_rng(SCATTER_SEED).standard_normal(len(num_gaps))
        factor: Floats = np.exp(np.sqrt(variance) * luck - variance / 2)
        return factor

    def _sample_timings(self) -> tuple[Floats, tuple[int, int]]:
        # The router predicts steps of batches that are larger than those that are computed.
        size = max(4 * self._options.max_num_requests, MIN_TABLE_SIZE) + 1
        sizes = np.arange(size)
        found = {id(pool): pool.timing.to_steps(size - 1) for pool in self._pools}
        timings = [found[id(pool)] for pool in self._pools]
        most = max(len(timing.prefill_tokens) for timing in timings)
        curves = np.zeros((len(timings), 3 * most + 2 * size))
        for row, timing in zip(curves, timings, strict=True):
            row[: 3 * len(timing.prefill_tokens)] = np.concatenate(
                [timing.prefill_tokens, timing.prefill_s, timing.pair_s]
            )
            row[3 * most : 3 * most + size] = at_sizes(timing.decode_s, sizes)
            row[3 * most + size :] = at_sizes(timing.context_s, sizes)
        self._timings = timings
        return curves, (3 * most, size)

    def _new_instances(self) -> tuple[Ints, Floats]:
        options, num = self._options, len(self._pools)
        depth = max(pool.pp for pool in self._pools)
        instances = np.zeros((num, state.NUM_INSTANCE_COLUMNS), np.int64)
        instance_s = np.zeros((num, state.STAGES + depth))
        for queue in (state.QUEUE, state.WAITING, state.JOINING):
            instances[:, queue : queue + 2] = state.NONE
        instances[:, state.BUDGET] = options.max_step_tokens
        instances[:, state.MAX_ACTIVE] = options.max_num_requests
        told = {id(pool): self._told_coefficients(pool) for pool in self._pools}
        for number, (pool, timing) in enumerate(zip(self._pools, self._timings, strict=True)):
            row, clock = instances[number], instance_s[number]
            clock[state.TOLD_FIXED_S : state.STAGES] = told[id(pool)]
            row[state.READS] = pool.role != PoolRole.DECODE
            row[state.WRITES] = pool.role != PoolRole.PREFILL
            row[state.DEPTH] = pool.pp
            blocks = pool.kv_tokens // options.block_size if pool.kv_tokens else UNLIMITED_BLOCKS
            row[state.NUM_BLOCKS] = row[state.FREE_BLOCKS] = blocks
            row[state.NUM_KNOTS] = len(timing.prefill_tokens)
            clock[state.SECONDS_PER_TOKEN] = pool.kv_bytes_per_token / pool.link.bytes_per_s
            clock[state.LINK_LATENCY] = pool.link.latency_s
            clock[state.SHARED_S] = timing.shared_s
            clock[state.PROMPT_S] = pool.prompt_s
            clock[state.PROMPT_TOKEN_S] = pool.prompt_token_s
            clock[state.BESIDE] = pool.beside
            clock[state.BESIDE_ANSWER] = pool.beside_answer
            clock[state.WAKE_S] = pool.wake_s
            clock[state.STOLEN_S] = pool.stolen_s
        return instances, instance_s

    def _told_coefficients(self, pool: Pool) -> tuple[float, ...]:
        """What the router hears of a worker's step times: lines, whatever the curves are."""
        found = linear_steps(
            pool,
            max_step_tokens=self._options.max_step_tokens,
            max_num_requests=self._options.max_num_requests,
        )
        return tuple(getattr(found, name) for name in TERMS)

    def _check(self, trace: Trace) -> None:
        if len(trace) == 0:
            return
        if (least := int(trace.outputs.min())) < 1:
            row = int(trace.outputs.argmin())
            raise LocalFault(f"request {row}: output_tokens must be at least 1; got {least}")
        size = self._options.block_size
        room = self._instances[:, state.NUM_BLOCKS] * size
        writers = self._instances[:, state.WRITES] > 0
        max_tokens = (trace.outputs * self._options.max_tokens_factor + 0.5).astype(int)
        held = num_answer_kv_tokens(trace.prompts, max_tokens)
        for tokens, most, what in (
            (held, int(room[writers].max()), "prompt and answer"),
            (trace.prompts, int(room.min()), "prompt"),
        ):
            if (longest := int(tokens.max())) > most:
                raise LocalFault(
                    f"request {int(tokens.argmax())}: {what} need the KV of {longest} tokens; that "
                    f"exceeds the memory of an instance, {most} tokens"
                )

    def _new_cluster(
        self, trace: Trace, ttft_s: Floats | None, *, is_closed: bool
    ) -> state.Cluster:
        options, num, num_instances = self._options, len(trace), len(self._pools)
        requests = np.zeros((num, state.NUM_REQUEST_COLUMNS), np.int64)
        requests[:, state.PROMPT], requests[:, state.OUTPUT] = trace.prompts, trace.outputs
        request_s = np.zeros((num, state.NUM_REQUEST_TIMES))
        request_s[:, state.ARRIVAL_S] = trace.arrival_s
        if ttft_s is not None:
            request_s[:, state.DEADLINE_S] = ttft_s
        has_cache = options.prefix_cache_tokens > 0 and trace.prefix_ids is not None
        prefix_ids = trace.prefix_ids if trace.prefix_ids is not None else np.zeros(0, np.int64)
        num_prefixes = int(prefix_ids.max()) + 1 if has_cache and len(prefix_ids) else 0
        cache = np.full((num_instances if has_cache else 1, 2, num_prefixes + 1), -1, np.int32)
        cache[:, :, -1] = num_prefixes
        scalars = np.zeros(state.NUM_SCALARS, np.int64)
        scalars[state.BLOCK_SIZE] = options.block_size
        scalars[state.IS_CLOSED_LOOP] = is_closed
        scalars[state.COUNTS_REQUESTS] = options.policy == "least_requests"
        scalars[state.BY_DEADLINE] = options.prefill_order == "deadline"
        scalars[state.MAX_UNREAD_REQUESTS] = options.max_num_waiting
        if has_cache:
            scalars[state.PREFIX_BLOCK] = trace.prefix_block_tokens
            blocks = options.prefix_cache_tokens // trace.prefix_block_tokens
            scalars[state.CACHE_BLOCKS] = blocks
        scalars[state.DECODE_TABLE], scalars[state.TABLE_SIZE] = self._layout
        reads = self._instances[:, state.READS] > 0
        writes = self._instances[:, state.WRITES] > 0
        scalars[state.NUM_READERS] = (reads & ~writes).sum()
        scalars[state.NUM_WRITERS] = (writes & ~reads).sum()
        scalars[state.IS_SHARED] = any(
            pool.beside != 1.0 or pool.stolen_s > 0.0 for pool in self._pools
        )
        depth = int(self._instances[:, state.DEPTH].max())
        most = min(options.max_step_tokens, state.MAX_PROMPTS_IN_STEP)
        # For a request at most its arrival, a release, its KV, three wakes and two cut runs; for an
        # instance the steps in its pipeline, its stage and its run.
        num_events = 8 * num + num_instances * (depth + 4) + 16
        if scalars[state.IS_SHARED]:
            # Ends that were moved stay in the heap until their time, or are not moved.
            num_events += num_instances * STALE_EVENTS_PER_INSTANCE
            scalars[state.MAX_STALE_EVENTS] = num_instances * STALE_EVENTS_PER_INSTANCE
        rates = np.array(
            [
                options.handoff_s,
                options.max_tokens_factor,
                options.max_wait_s,
                options.busy_handoff_s,
                0.0,  # LONGEST_WAIT_S
            ]
        )
        starts = trace.prefix_starts
        return state.Cluster(
            requests=requests,
            request_s=request_s,
            instances=self._instances.copy(),
            instance_s=self._instance_s.copy(),
            curves=self._curves,
            heap=np.zeros((num_instances, options.max_num_requests + 1), np.int64),
            chunks=np.zeros((num_instances, depth + 2, most + 1, 2), np.int64),
            event_s=np.empty(num_events),
            event_number=np.empty(num_events, np.int64),
            events=np.empty(num_events, np.int64),
            scalars=scalars,
            rates=rates,
            cache=cache,
            prefix=prefix_ids,
            prefix_starts=starts if starts is not None else np.zeros(num + 1, np.int64),
        )
