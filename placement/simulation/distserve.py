"""Rules distserve: pools turned into arrays once, then any number of traces simulated."""

from collections.abc import Sequence

import numpy as np

from pdserve.domain.errors import LocalFault
from placement.simulation import distserve_decode as decode
from placement.simulation import distserve_pipelines as pipelines
from placement.simulation.distserve_colocated import run_colocated_pool
from placement.simulation.distserve_prefill import NONE, run_prefill_pool
from placement.simulation.timing import DistserveTiming
from placement.simulation.trace import Floats, Ints, Times, Trace
from placement.simulation.values import Pool, PoolRole


class DistserveCluster:
    """Prefill and decode pools of DistServe's simulator, or its colocated instances."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._instances = [
            (number, pool)
            for number, pool in enumerate(pool for pool in pools for _ in range(pool.replicas))
        ]
        roles = {pool.role for pool in pools}
        self._is_colocated = roles == {PoolRole.COLOCATED}
        if not self._is_colocated and roles != {PoolRole.PREFILL, PoolRole.DECODE}:
            raise LocalFault(
                "rules distserve: pools must be prefill and decode, or all colocated; got "
                + ", ".join(sorted(roles))
            )
        readers = PoolRole.COLOCATED if self._is_colocated else PoolRole.PREFILL
        writers = PoolRole.COLOCATED if self._is_colocated else PoolRole.DECODE
        self._readers = [item for item in self._instances if item[1].role == readers]
        self._writers = [item for item in self._instances if item[1].role == writers]
        self._reader_numbers = np.array([number for number, _ in self._readers])
        self._writer_numbers = np.array([number for number, _ in self._writers])
        self._stages = np.array([_prefill_row(pool) for _, pool in self._readers])
        self._rows = np.array([_decode_row(pool) for _, pool in self._writers])
        self._prompt_limit = min(_timing(pool).max_num_tokens for _, pool in self._readers)
        depth = max(pool.pp for _, pool in self._writers)
        self._is_explicit = depth > 1

    def run(self, trace: Trace, *, is_explicit: bool = False) -> Times:
        """Simulate; `is_explicit` steps one by one where closed forms would do, as a check."""
        self._check(trace)
        arrival_ms = trace.arrival_s * 1e3
        if is_explicit or self._is_explicit:
            return self._run_pipelines(trace, arrival_ms)
        first_ms = np.zeros(len(trace))
        reader, writer = np.zeros(len(trace), np.int64), np.full(len(trace), NONE)
        busy_ms = np.zeros(len(self._instances))
        state = decode.new_state(self._rows, trace.prompts, trace.outputs)
        if self._is_colocated:
            run_colocated_pool(arrival_ms, self._stages, state, first_ms, reader)
            writer = np.where(trace.outputs > 0, reader, NONE)
        else:
            reading_ms = np.zeros(len(self._readers))
            order, starts, ends_ms = run_prefill_pool(
                arrival_ms, trace.prompts, self._stages, first_ms, reader, reading_ms
            )
            by_end = np.argsort(ends_ms, kind="stable")
            decode.run_decode_pool(state, order, starts, ends_ms, by_end, writer)
            busy_ms[self._reader_numbers] = reading_ms
        busy_ms[self._writer_numbers] = state.clocks[:, decode.BUSY]
        prefill = self._reader_numbers[reader]
        decoded = np.where(writer == NONE, NONE, self._writer_numbers[writer])
        return _times(trace, first_ms, state.last_ms, prefill, decoded, busy_ms)

    def _check(self, trace: Trace) -> None:
        """What the reference would step over for ever is an error."""
        limit = self._prompt_limit
        if len(trace) and (longest := int(trace.prompts.max())) > limit:
            row = int(trace.prompts.argmax())
            raise LocalFault(
                f"request {row}: prompt of {longest} tokens exceeds the {limit} tokens that one "
                "prefill instance holds"
            )
        totals = trace.prompts + trace.outputs
        if len(trace) and (most := int(totals.max())) > decode.MAX_NUM_TOKENS:
            raise LocalFault(
                f"request {int(totals.argmax())}: {most} tokens exceed the "
                f"{decode.MAX_NUM_TOKENS} of one decode batch under rules distserve"
            )

    def _run_pipelines(self, trace: Trace, arrival_ms: Floats) -> Times:
        readers = [(*item, True) for item in self._readers]
        writers = [] if self._is_colocated else [(*item, False) for item in self._writers]
        rows: list[list[int]] = []
        prefill_rows: list[list[float]] = []
        decode_rows: list[list[float]] = []
        heads: list[int] = []
        for number, pool, _ in readers + writers:
            first = len(rows)
            heads.append(first)
            for stage in range(pool.pp):
                row = [NONE, NONE, 0, NONE, NONE, 0, 0, NONE, 0, pipelines.IDLE]
                row += [first + (stage + 1) % pool.pp, stage == 0, stage == pool.pp - 1]
                rows.append([*row, self._is_colocated, number])
                prefill_rows.append(_prefill_row(pool))
                decode_rows.append([*_decode_row(pool), pool.pp])
        num, num_workers = len(trace), len(rows)
        requests = np.zeros((num, pipelines.NUM_REQUEST_COLUMNS), np.int64)
        requests[:, pipelines.PROMPT] = trace.prompts
        requests[:, pipelines.OUTPUT] = trace.outputs
        state = pipelines.Pipelines(
            workers=np.array(rows, np.int64),
            prefill_rows=np.array(prefill_rows),
            decode_rows=np.array(decode_rows),
            requests=requests,
            first_ms=np.zeros(num),
            last_ms=np.zeros(num),
            busy_ms=np.zeros(num_workers),
            decode_instance=np.full(num, NONE),
            decode_heads=np.array(heads[len(readers) :] or [0]),
            times=np.zeros(num_workers + 1),
            sequence=np.zeros(num_workers + 1, np.int64),
            items=np.zeros(num_workers + 1, np.int64),
            counters=np.zeros(3, np.int64),
        )
        prefill = np.zeros(num, np.int64)
        pipelines.run_pipelines(state, arrival_ms, np.array(heads[: len(readers)]), prefill)
        depth = np.bincount(state.workers[:, pipelines.INSTANCE])
        busy_ms = np.bincount(state.workers[:, pipelines.INSTANCE], weights=state.busy_ms) / depth
        return _times(trace, state.first_ms, state.last_ms, prefill, state.decode_instance, busy_ms)


def _times(
    trace: Trace, first_ms: Floats, last_ms: Floats, prefill: Ints, decode: Ints, busy_ms: Floats
) -> Times:
    """The reference divides by all tokens that were decoded, so by the output length."""
    arrival_ms = trace.arrival_s * 1e3
    return Times(
        arrival_s=trace.arrival_s,
        ttft_s=(first_ms - arrival_ms) / 1e3,
        tpot_s=(last_ms - first_ms) / np.maximum(trace.outputs, 1) / 1e3,
        e2e_s=(last_ms - arrival_ms) / 1e3,
        prefill=prefill,
        decode=decode,
        busy_s=busy_ms / 1e3,
    )


def _timing(pool: Pool) -> DistserveTiming:
    if not isinstance(pool.timing, DistserveTiming):
        raise LocalFault("rules distserve need a latency profile in DistServe's form (JSON)")
    return pool.timing


def _prefill_row(pool: Pool) -> list[float]:
    timing = _timing(pool)
    return [*timing.prefill, pool.pp, timing.max_num_tokens]


def _decode_row(pool: Pool) -> list[float]:
    timing = _timing(pool)
    return [*timing.decode_small, *timing.decode_large, timing.threshold]
