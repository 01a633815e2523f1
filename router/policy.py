"""Which workers take a request: the pair with the least predicted time to its last token.

    predicted total = ttft + max_tokens * step
    ttft            = prompts ahead at the reader and this prompt + handoff
    step            = one decode step of the batch that this request joins

Each part comes from the worker's own step coefficients, by `pdserve.domain.pair_cost`: the
planner's simulator chooses by the same functions.
"""

from dataclasses import dataclass

from pdserve.domain.latency import num_attention_pairs
from pdserve.domain.messages import Reads
from pdserve.domain.pair_cost import (
    answer_s,
    answer_step_s,
    first_token_s,
    pair_rank,
    reader_rank,
    reading_s,
)
from router.cluster_view import ClusterView, Health, Life, RequestShape, WorkerView

MAX_NUM_PREFILL_TARGETS = 3
MIN_RETRY_AFTER_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Where a request goes. No prefill targets: the decode worker reads the prompt itself."""

    decode: WorkerView
    prefill_targets: tuple[WorkerView, ...]  # best first
    ttft_s: float
    step_s: float

    @property
    def wait_s(self) -> float:
        """Until the prompts that are ahead of this one have been read."""
        return _read_s(self.reader)

    @property
    def reader(self) -> WorkerView:
        """The worker that is expected to read the prompt."""
        return self.readers[0]

    @property
    def readers(self) -> tuple[WorkerView, ...]:
        """Who may read the prompt, best first."""
        return self.prefill_targets or (self.decode,)


@dataclass(frozen=True, slots=True)
class NoWorkers:
    """No healthy decode worker is left for this request."""


@dataclass(frozen=True, slots=True)
class Overloaded:
    """Every queue is longer than a request may wait; the shortest is so long no more by then."""

    retry_after_s: float


def choose_pair(
    view: ClusterView,
    shape: RequestShape,
    *,
    excluded: frozenset[Life] = frozenset(),
    max_wait_s: float = float("inf"),
) -> Pair | NoWorkers | Overloaded:
    """Pick the workers with the least predicted time to the last token.

    A worker that reads its own prompts never hands them on; one that reads none has them read by
    prefill workers, and reads them itself only while no prefill worker is left for it. A reader
    where the request would have to wait longer than `max_wait_s` comes after all where it would
    not, and a decode worker where it would have to wait for blocks or for a place in the batch
    after all where it would not. Pure and total: same view, same answer; ties go to the smallest
    worker ids. `excluded` has already failed this request. If no decode worker is healthy, a
    suspect one is taken: on a busy machine it is late, not dead, and if it is dead the request is
    told so within moments.
    """
    readers = _ranked(
        [worker for worker in view.prefill if worker.is_usable and worker.life not in excluded],
        shape,
        max_wait_s,
    )
    fitting = [
        worker for worker in view.decode if worker.life not in excluded and _fits(worker, shape)
    ]
    usable = [worker for worker in fitting if worker.is_usable]
    suspect = [worker for worker in fitting if worker.health is Health.SUSPECT]
    candidates = [_pair_at(decode, readers, shape) for decode in usable or suspect]
    if not candidates:
        return NoWorkers()
    best = min(candidates, key=lambda pair: _rank(pair, shape, max_wait_s))
    if best.wait_s > max_wait_s:
        wait_s = min(_read_s(reader) for pair in candidates for reader in pair.readers)
        return Overloaded(max(wait_s - max_wait_s, MIN_RETRY_AFTER_S))
    return best


def _fits(decode: WorkerView, shape: RequestShape) -> bool:
    return shape.num_blocks(decode.hello.block_size) <= decode.hello.num_blocks


def _ranked(readers: list[WorkerView], shape: RequestShape, max_wait_s: float) -> list[WorkerView]:
    """Prefill workers, best first."""

    def rank(reader: WorkerView) -> tuple[tuple[bool, float], Life]:
        is_late = _read_s(reader) > max_wait_s
        return (reader_rank(is_late, _read_s(reader, shape)), reader.life)

    return sorted(readers, key=rank)


def _pair_at(decode: WorkerView, readers: list[WorkerView], shape: RequestShape) -> Pair:
    is_reader = decode.hello.reads is Reads.OWN
    others = [] if is_reader else [each for each in readers if each.can_exchange_kv_with(decode)]
    return Pair(
        decode=decode,
        prefill_targets=tuple(others[:MAX_NUM_PREFILL_TARGETS]),
        ttft_s=first_token_s(_read_s(others[0] if others else decode, shape), bool(others)),
        step_s=_step_s(decode, shape),
    )


def _rank(
    pair: Pair, shape: RequestShape, max_wait_s: float
) -> tuple[tuple[bool, bool, float, int], Life]:
    decode = pair.decode
    num_free_after = decode.num_free_blocks - shape.num_blocks(decode.hello.block_size)
    is_full = num_free_after < 0 or decode.num_requests >= decode.hello.max_num_requests
    is_late = pair.wait_s > max_wait_s
    seconds = answer_s(pair.ttft_s, shape.max_tokens, pair.step_s)
    return (pair_rank(is_late, is_full, seconds, num_free_after), decode.life)


def _read_s(reader: WorkerView, shape: RequestShape | None = None) -> float:
    """Time to read the prompts that are ahead, and then that of `shape`."""
    hello, coefficients = reader.hello, reader.hello.coefficients
    num_tokens = shape.num_prompt_tokens if shape else 0
    return reading_s(
        coefficients.fixed_s,
        coefficients.prefill_token_s,
        coefficients.prefill_attention_s,
        hello.max_step_tokens,
        hello.num_stages,
        reader.num_unread_tokens + num_tokens,
        reader.assigned.num_unread_pairs + num_attention_pairs(0, num_tokens),
    )


def _step_s(decode: WorkerView, shape: RequestShape) -> float:
    coefficients = decode.hello.coefficients
    return answer_step_s(
        coefficients.fixed_s,
        coefficients.decode_token_s,
        coefficients.decode_context_token_s,
        decode.hello.num_stages,
        decode.num_requests + 1,
        decode.num_context_tokens + shape.num_prompt_tokens,
    )
