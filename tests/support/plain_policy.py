"""The rule of `router.policy.LeastCost` as it is defined: every pair is built, the best taken.

Written for comparison: each decode worker ranks all readers anew, and nothing is left out early.
"""

from dataclasses import dataclass

from pdserve.domain.latency import num_attention_pairs
from pdserve.domain.messages import Reads
from pdserve.domain.pair_cost import HANDOFF_S, PolicyName
from router.capacity import can_read, can_write
from router.cluster_view import ClusterView, Health, Life, RequestShape, WorkerView
from router.policy import (
    MAX_NUM_PREFILL_TARGETS,
    MIN_RETRY_AFTER_S,
    NoWorkers,
    Overloaded,
    Pair,
    read_s,
    step_s,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPolicy:
    name: PolicyName

    def choose(
        self,
        view: ClusterView,
        shape: RequestShape,
        *,
        excluded: frozenset[Life] = frozenset(),
        max_wait_s: float = float("inf"),
    ) -> Pair | NoWorkers | Overloaded:
        left = [
            decode
            for decode in view.decode
            if decode.life not in excluded and can_write(decode.hello, shape)
        ]
        healths = [health for health in (Health.ALIVE, Health.SUSPECT) if _with(left, health)]
        if not healths:
            return NoWorkers()
        pairs = [
            Pair(decode=decode, prefill_targets=targets)
            for decode in _with(left, healths[0])
            for targets in [self._targets(decode, view, shape, excluded, max_wait_s)]
        ]
        best = min(pairs, key=lambda pair: self._rank(pair, shape, max_wait_s))
        if best.wait_s > max_wait_s:
            readers = [each for pair in pairs for each in (pair.prefill_targets or (pair.decode,))]
            return Overloaded(max(min(map(read_s, readers)) - max_wait_s, MIN_RETRY_AFTER_S))
        return best

    def _targets(
        self,
        decode: WorkerView,
        view: ClusterView,
        shape: RequestShape,
        excluded: frozenset[Life],
        max_wait_s: float,
    ) -> tuple[WorkerView, ...]:
        if decode.hello.reads is Reads.OWN:
            return ()
        able = [
            reader
            for reader in _with(view.prefill, Health.ALIVE)
            if reader.life not in excluded
            and reader.can_exchange_kv_with(decode)
            and can_read(reader.hello, shape)
        ]

        def rank(reader: WorkerView) -> tuple[bool, float, Life]:
            cost = _read_s(reader, shape) if self._is_by_time else reader.num_requests
            return (read_s(reader) > max_wait_s, cost, reader.life)

        return tuple(sorted(able, key=rank)[:MAX_NUM_PREFILL_TARGETS])

    def _rank(
        self, pair: Pair, shape: RequestShape, max_wait_s: float
    ) -> tuple[bool, bool, float, int, Life]:
        decode = pair.decode
        free = decode.num_free_blocks - shape.num_blocks(decode.hello.block_size)
        is_full = free < 0 or decode.num_requests >= decode.hello.max_num_requests
        cost: float = decode.num_requests
        if self._is_by_time:
            ttft_s = _read_s(pair.reader, shape) + (HANDOFF_S if pair.prefill_targets else 0.0)
            cost = ttft_s + shape.max_tokens * step_s(decode, shape)
        return (pair.wait_s > max_wait_s, is_full, cost, -free, decode.life)

    @property
    def _is_by_time(self) -> bool:
        return self.name == "least_total_time"


def _with(workers: "tuple[WorkerView, ...] | list[WorkerView]", health: Health) -> list[WorkerView]:
    return [worker for worker in workers if worker.health is health]


def _read_s(reader: WorkerView, shape: RequestShape) -> float:
    num_tokens = shape.num_prompt_tokens
    return read_s(reader, num_tokens, num_attention_pairs(0, num_tokens))
