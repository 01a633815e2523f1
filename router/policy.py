"""Which workers take a request: policies by name, each a pure function of a view of the cluster.

    least_total_time   the least predicted time to the last token (`pdserve.domain.pair_cost`)
    least_requests     the fewest requests at the reader of the prompt, and at the decode worker

Both take times from the workers' step coefficients, as their live steps correct them
(`router.step_times`). The planner's simulator chooses by the same functions.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from pdserve.domain.ids import WorkerId
from pdserve.domain.kv_demand import num_answer_kv_tokens, num_blocks_for
from pdserve.domain.latency import num_attention_pairs
from pdserve.domain.messages import Reads
from pdserve.domain.pair_cost import (
    PolicyName,
    answer_s,
    answer_step_s,
    first_token_s,
    pair_rank,
    reader_rank,
    reading_s,
)
from router.capacity import can_read, can_write
from router.cluster_view import ClusterView, Health, Life, RequestShape, WorkerView

MAX_NUM_PREFILL_TARGETS = 3
MIN_RETRY_AFTER_S = 0.1
RankedReader = tuple[tuple[bool, float], WorkerId, float, WorkerView]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Where a request goes. No prefill targets: the decode worker reads the prompt itself."""

    decode: WorkerView
    prefill_targets: tuple[WorkerView, ...]  # best first

    @property
    def wait_s(self) -> float:
        """Until the prompts that are ahead of this one have been read."""
        return read_s(self.reader)

    @property
    def reader(self) -> WorkerView:
        """The worker that is expected to read the prompt."""
        return self.prefill_targets[0] if self.prefill_targets else self.decode


@dataclass(frozen=True, slots=True)
class NoWorkers:
    """No healthy decode worker is left for this request."""


@dataclass(frozen=True, slots=True)
class Overloaded:
    """Every queue is longer than a request may wait; the shortest is so long no more by then."""

    retry_after_s: float


class Policy(Protocol):
    """Pure and total: same view, same answer; ties go to the smallest worker ids."""

    def choose(
        self,
        view: ClusterView,
        shape: RequestShape,
        *,
        excluded: frozenset[Life] = frozenset(),
        max_wait_s: float = float("inf"),
    ) -> Pair | NoWorkers | Overloaded:
        """Pick workers, but none that is `excluded`, since those have failed this request.

        `Overloaded` if the request would have to wait longer than `max_wait_s` at every reader.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastCost:
    """The reader of the least cost, and the decode worker of the least cost beside that reader.

    A worker that reads its own prompts never hands them on; one that reads none has them read by
    prefill workers, and reads them itself only while no prefill worker is left for it. A reader
    where the request would have to wait too long comes after all where it would not, and a decode
    worker where it would have to wait for blocks or for a place in the batch after all where it
    would not. If no decode worker is healthy, a suspect one is taken: on a busy machine it is late,
    not dead, and if it is dead the request is told so within moments.
    """

    reader_cost: Callable[[WorkerView, float], float]
    """Of one that needs so many seconds for what is ahead and the prompt."""
    decode_cost: Callable[[WorkerView, RequestShape, float], float]
    """Of one whose answer begins after so many seconds."""

    def choose(
        self,
        view: ClusterView,
        shape: RequestShape,
        *,
        excluded: frozenset[Life] = frozenset(),
        max_wait_s: float = float("inf"),
    ) -> Pair | NoWorkers | Overloaded:
        num_pairs = num_attention_pairs(0, shape.num_prompt_tokens)
        num_kv_tokens = num_answer_kv_tokens(shape.num_prompt_tokens, shape.max_tokens)

        def ranked(reader: WorkerView, is_handed_over: bool) -> RankedReader:
            seconds = read_s(reader, shape.num_prompt_tokens, num_pairs)
            # What is ahead takes no longer than that and the prompt.
            is_late = seconds > max_wait_s and read_s(reader) > max_wait_s
            rank = reader_rank(is_late, self.reader_cost(reader, seconds))
            return (rank, reader.hello.worker_id, first_token_s(seconds, is_handed_over), reader)

        able = [each for each in _left(view.prefill, excluded) if can_read(each.hello, shape)]
        ranking = sorted(ranked(each, True) for each in able if each.health is Health.ALIVE)
        readers_of: dict[Hashable, Sequence[RankedReader]] = {}
        pairs = []
        for decode in _writers(view.decode, shape, excluded):
            hello, readers = decode.hello, readers_of.get(decode.kv_format)
            if readers is None:  # once for all decode workers of one format
                fit = (each for each in ranking if each[-1].can_exchange_kv_with(decode))
                readers = readers_of[decode.kv_format] = tuple(islice(fit, MAX_NUM_PREFILL_TARGETS))
            if hello.reads is Reads.OWN or not readers:
                readers = (ranked(decode, False),)
            (is_late, _), _, ttft_s, _ = readers[0]
            num_blocks = num_blocks_for(num_kv_tokens, hello.block_size)
            num_free_after = decode.num_free_blocks - num_blocks
            is_full = num_free_after < 0 or decode.num_requests >= hello.max_num_requests
            cost = self.decode_cost(decode, shape, ttft_s)
            rank = pair_rank(is_late, is_full, cost, num_free_after)
            pairs.append((rank, hello.worker_id, decode, readers))
        if not pairs:
            return NoWorkers()
        (is_late, *_), _, decode, readers = min(pairs)
        if is_late:
            wait_s = min(read_s(reader) for *_, readers in pairs for *_, reader in readers)
            return Overloaded(max(wait_s - max_wait_s, MIN_RETRY_AFTER_S))
        targets = tuple(reader for *_, reader in readers if reader is not decode)
        return Pair(decode=decode, prefill_targets=targets)


def _writers(
    workers: Sequence[WorkerView], shape: RequestShape, excluded: frozenset[Life]
) -> Sequence[WorkerView]:
    fitting = [each for each in _left(workers, excluded) if can_write(each.hello, shape)]
    alive = [each for each in fitting if each.health is Health.ALIVE]
    return alive or [each for each in fitting if each.health is Health.SUSPECT]


def _left(workers: Sequence[WorkerView], excluded: frozenset[Life]) -> Sequence[WorkerView]:
    return [each for each in workers if each.life not in excluded] if excluded else workers


def read_s(reader: WorkerView, num_tokens: int = 0, num_pairs: int = 0) -> float:
    """Time to read the prompts that are ahead, and then one of so many tokens."""
    hello, coefficients = reader.hello, reader.coefficients
    return reading_s(
        coefficients.fixed_s,
        coefficients.prefill_token_s,
        coefficients.prefill_attention_s,
        hello.max_step_tokens,
        hello.num_stages,
        reader.num_unread_tokens + num_tokens,
        reader.assigned.num_unread_pairs + num_pairs,
    )


def step_s(decode: WorkerView, shape: RequestShape) -> float:
    """Time of a decode step of the batch that `shape` joins."""
    coefficients = decode.coefficients
    return answer_step_s(
        coefficients.fixed_s,
        coefficients.decode_token_s,
        coefficients.decode_context_token_s,
        decode.hello.num_stages,
        decode.num_requests + 1,
        decode.num_context_tokens + shape.num_prompt_tokens,
    )


least_total_time = LeastCost(
    reader_cost=lambda _, seconds: seconds,
    decode_cost=lambda decode, shape, ttft_s: answer_s(
        ttft_s, shape.max_tokens, step_s(decode, shape)
    ),
)
least_requests = LeastCost(
    reader_cost=lambda reader, _: reader.num_requests,
    decode_cost=lambda decode, *_: decode.num_requests,
)

POLICIES: Mapping[PolicyName, Policy] = {
    "least_total_time": least_total_time,
    "least_requests": least_requests,
}
