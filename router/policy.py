"""Which workers take a request: the pair with the least predicted time to its last token.

    predicted total = ttft + max_tokens * step
    ttft            = prompts ahead at the reader + this prompt + handoff
    step            = one decode step of the batch that this request joins

Each part comes from the worker's step coefficients (`pdserve.domain.latency`), as its live steps
correct them (`router.step_times`).
"""

from dataclasses import dataclass

from pdserve.domain.latency import StepShape
from router.capacity import can_read, can_write
from router.cluster_view import ClusterView, Health, Life, RequestShape, WorkerView

MAX_NUM_PREFILL_TARGETS = 3
HANDOFF_S = 0.002
"""What passing KV on adds to TTFT: messages only, since the transfer overlaps the reading."""
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
        return _queue_s(self.reader)

    @property
    def reader(self) -> WorkerView:
        """The worker that is expected to read the prompt."""
        return self.prefill_targets[0] if self.prefill_targets else self.decode


@dataclass(frozen=True, slots=True)
class NoWorkers:
    """No healthy decode worker is left for this request."""


@dataclass(frozen=True, slots=True)
class Overloaded:
    """Every queue is longer than a request may wait."""

    retry_after_s: float


def choose_pair(
    view: ClusterView,
    shape: RequestShape,
    *,
    excluded: frozenset[Life] = frozenset(),
    max_wait_s: float = float("inf"),
) -> Pair | NoWorkers | Overloaded:
    """Pick the workers with the least predicted time to the last token.

    A decode worker where the request would have to wait for blocks or for a place in the batch
    comes after all where it would not. Pure and total: same view, same answer; ties go to the
    smallest worker ids. `excluded` has already failed this request. Where no decode worker is
    healthy a suspect one is taken: on a busy machine it is late, not dead, and if it is dead the
    request is told so within moments.
    """
    readers = [
        worker for worker in view.prefill if worker.is_usable and worker.life not in excluded
    ]
    fitting = [
        worker
        for worker in view.decode
        if worker.life not in excluded and can_write(worker.hello, shape)
    ]
    usable = [worker for worker in fitting if worker.is_usable]
    suspect = [worker for worker in fitting if worker.health is Health.SUSPECT]
    candidates = [_pair_at(decode, readers, shape) for decode in usable or suspect]
    if not candidates:
        return NoWorkers()
    best = min(candidates, key=lambda pair: _cost(pair, shape))
    if best.wait_s > max_wait_s:
        return Overloaded(max(best.wait_s - max_wait_s, MIN_RETRY_AFTER_S))
    return best


def _pair_at(decode: WorkerView, readers: list[WorkerView], shape: RequestShape) -> Pair:
    compatible = [
        reader
        for reader in readers
        if reader.can_exchange_kv_with(decode) and can_read(reader.hello, shape)
    ]
    ranked = sorted(compatible, key=lambda reader: (_read_s(reader, shape), reader.life))
    ttft_s = _read_s(ranked[0], shape) + HANDOFF_S if ranked else _read_s(decode, shape)
    return Pair(
        decode=decode,
        prefill_targets=tuple(ranked[:MAX_NUM_PREFILL_TARGETS]),
        ttft_s=ttft_s,
        step_s=_step_s(decode, shape),
    )


def _cost(pair: Pair, shape: RequestShape) -> tuple[bool, float, int, Life]:
    num_free_after = pair.decode.num_free_blocks - shape.num_blocks(pair.decode.hello.block_size)
    is_full = pair.decode.num_requests >= pair.decode.hello.max_num_requests
    total_s = pair.ttft_s + shape.max_tokens * pair.step_s
    return (num_free_after < 0 or is_full, total_s, -num_free_after, pair.decode.life)


def _queue_s(reader: WorkerView) -> float:
    """Time to read the prompts that are ahead."""
    tokens = reader.num_unread_tokens
    coefficients = reader.coefficients
    return (
        coefficients.fixed_s * -(-tokens // reader.hello.max_step_tokens)
        + coefficients.prefill_token_s * tokens
        + coefficients.prefill_attention_s * reader.assigned.num_unread_pairs
    )


def _read_s(reader: WorkerView, shape: RequestShape) -> float:
    hello = reader.hello
    own_s = reader.coefficients.prefill_s(0, shape.num_prompt_tokens, hello.max_step_tokens)
    return _queue_s(reader) + own_s


def _step_s(decode: WorkerView, shape: RequestShape) -> float:
    return decode.coefficients.step_s(
        StepShape(
            num_decodes=decode.num_requests + 1,
            num_decode_context_tokens=decode.num_context_tokens + shape.num_prompt_tokens,
        )
    )
