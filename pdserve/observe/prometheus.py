"""The metrics of one process: what happens is counted as it happens, what is, when it is asked.

The only module that knows the Prometheus library. A child of a labelled metric is looked up once,
not at each event; label values that can be known beforehand start at 0, so that `rate` sees their
first event.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from pdserve import __version__
from pdserve.config.processes import SloClass
from pdserve.domain.engine_spec import StepPath
from pdserve.domain.errors import Reason
from pdserve.domain.ids import PROTOCOL_VERSION
from pdserve.domain.latency import LiveSteps, StepCoefficients
from pdserve.domain.messages import KvMoved, WorkerLoad
from pdserve.domain.tokens import FinishReason, PhaseTimeline
from pdserve.observe import metrics as m
from pdserve.observe.logging import num_dropped_lines
from pdserve.observe.metrics import MetricSpec, Process
from pdserve.observe.watch import DecodeWatch, PrefillWatch, RequestEnd, RouterWatch, WorkerWatch

NO_CLASS = "none"
"""The label of requests where the router has no SLO classes."""
REFUSAL_REASONS = (Reason.OVERLOADED, Reason.QUEUE_TIMEOUT, Reason.DRAINING)
PREFILL_PHASES = ("prefill_queue", "prefill")
DECODE_PHASES = ("reserve", "transfer", "handoff_wait", "decode_queue", "decode")
ONLY_WITH_HANDOFF = frozenset({"transfer", "handoff_wait"})

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)

WorkerCounts = Iterable[tuple[str, str]]
"""Role and health of each registered worker."""


class ProcessMetrics:
    """A registry of its own with what every process exposes."""

    def __init__(self, process: Process, name: str) -> None:
        # The library would expose a second series for each counter: when it was made.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        build = self._gauge(m.BUILD)
        build.labels(__version__, str(PROTOCOL_VERSION), process, name).set(1)
        self._is_draining = self._gauge(m.DRAINING)
        self._loop_lag = self._histogram(m.LOOP_LAG)
        self._phase = self._histogram(m.PHASE)
        self._dropped_log_lines = self._counter(m.DROPPED_LOG_LINES)
        self._num_dropped_log_lines = 0
        self._refusals = self._counter(m.REFUSALS)
        for reason in REFUSAL_REASONS:
            self._refusals.labels(reason)

    def loop_was_late(self, lag_s: float) -> None:
        self._loop_lag.observe(lag_s)

    def refresh(self) -> None:
        """Read what is true now; call on the event loop, which owns what is read."""
        num_dropped = num_dropped_lines()
        self._dropped_log_lines.inc(num_dropped - self._num_dropped_log_lines)
        self._num_dropped_log_lines = num_dropped

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics as text, and its content type, in the best format that `accept` names.

        Safe in any thread; live values are those of the last `refresh`.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.name, spec.help, spec.labels, registry=self._registry)

    def _gauge(self, spec: MetricSpec) -> Gauge:
        return Gauge(spec.name, spec.help, spec.labels, registry=self._registry)

    def _histogram(self, spec: MetricSpec) -> Histogram:
        return Histogram(
            spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=self._registry
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterNow:
    """The router at one moment."""

    num_in_flight: int
    num_waiting: int
    workers: WorkerCounts
    is_draining: bool


class RouterMetrics(ProcessMetrics, RouterWatch):
    """`now` is asked at each scrape, once it is set."""

    def __init__(
        self,
        name: str,
        *,
        promises: Sequence[SloClass],
        slo_results: Sequence[str],
        worker_labels: Sequence[tuple[str, str]],
    ) -> None:
        super().__init__(Process.ROUTER, name)
        self.now: Callable[[], RouterNow] | None = None
        self._worker_labels = worker_labels
        self._queue = self._phase.labels("router_queue")
        self._ttft = self._histogram(m.TTFT)
        self._tpot = self._histogram(m.TPOT)
        self._request = self._histogram(m.REQUEST)
        for slo_class in [promise.name for promise in promises] or [NO_CLASS]:
            for histogram in (self._ttft, self._tpot, self._request):
                histogram.labels(slo_class)
        self._slo_requests = self._counter(m.SLO_REQUESTS)
        self._show_promises(promises, slo_results)
        self._requests = self._counter(m.REQUESTS)
        for finish in FinishReason:
            self._requests.labels("completed", finish)
        self._failed_attempts = self._counter(m.FAILED_ATTEMPTS)
        self._failed_attempts.labels(Reason.WORKER_LOST)
        self._in_flight = self._gauge(m.IN_FLIGHT)
        self._waiting = self._gauge(m.WAITING)
        self._prompt_tokens = self._counter(m.PROMPT_TOKENS)
        self._cached_tokens = self._counter(m.CACHED_TOKENS)
        self._output_tokens = self._counter(m.OUTPUT_TOKENS)
        self._workers = self._gauge(m.WORKERS_BY_HEALTH)

    def request_ended(self, end: RequestEnd) -> None:
        slo_class = end.slo_class or NO_CLASS
        self._requests.labels(end.outcome, end.reason).inc()
        if end.outcome == "refused":
            self._refusals.labels(end.reason).inc()
        if end.slo_result:
            self._slo_requests.labels(slo_class, end.slo_result).inc()
        if end.queue_s is not None:
            self._queue.observe(end.queue_s)
        if end.ttft_s is not None:
            self._ttft.labels(slo_class).observe(end.ttft_s)
        if end.tpot_s is not None:
            self._tpot.labels(slo_class).observe(end.tpot_s)
        self._output_tokens.inc(end.num_output_tokens)
        if end.outcome == "completed":
            self._request.labels(slo_class).observe(end.total_s)
            self._prompt_tokens.inc(end.num_prompt_tokens)
            self._cached_tokens.inc(end.num_cached_tokens)

    def attempt_failed(self, reason: str) -> None:
        self._failed_attempts.labels(reason).inc()

    def refresh(self) -> None:
        super().refresh()
        if self.now is None:
            return
        now = self.now()
        self._in_flight.set(now.num_in_flight)
        self._waiting.set(now.num_waiting)
        self._is_draining.set(now.is_draining)
        tally = Tally(now.workers)
        for labels in self._worker_labels:
            self._workers.labels(*labels).set(tally[labels])

    def _show_promises(self, promises: Sequence[SloClass], slo_results: Sequence[str]) -> None:
        limit, target = self._gauge(m.SLO_LIMIT), self._gauge(m.SLO_TARGET)
        for promise in promises:
            limit.labels(promise.name, "ttft").set(promise.ttft_s)
            limit.labels(promise.name, "tpot").set(promise.tpot_s)
            target.labels(promise.name).set(promise.attainment)
            for result in slo_results:
                self._slo_requests.labels(promise.name, result)


class WorkerMetrics(ProcessMetrics, WorkerWatch):
    """`now` is asked for the worker's load at each scrape, once it is set.

    `coefficients` are those of the worker's hello.
    """

    def __init__(self, process: Process, name: str, *, block_bytes: int) -> None:
        super().__init__(process, name)
        self.now: Callable[[], WorkerLoad] | None = None
        self.coefficients: StepCoefficients | None = None
        self._step = self._histogram(m.STEP)
        self._batch = self._histogram(m.BATCH)
        self._launches = _children(self._counter(m.STEP_LAUNCHES), tuple(StepPath))
        self._step_failures = self._counter(m.STEP_FAILURES)
        self._row_failures = self._counter(m.ROW_FAILURES)
        for reason in (Reason.UNUSABLE_LOGITS, Reason.INTERNAL):
            self._row_failures.labels(reason)
        slowness = self._gauge(m.STEP_SLOWNESS)
        self._prefill_slowness = slowness.labels("prefill")
        self._decode_slowness = slowness.labels("decode")
        self._prompt_tokens = self._counter(m.ENGINE_PROMPT_TOKENS)
        self._cached_tokens = self._counter(m.ENGINE_CACHED_TOKENS)
        self._output_tokens = self._counter(m.ENGINE_OUTPUT_TOKENS)
        self._running = self._gauge(m.RUNNING)
        self._queued = self._gauge(m.QUEUED)
        self._queued_tokens = self._gauge(m.QUEUED_TOKENS)
        self._dropped = _children(self._counter(m.DROPPED_MESSAGES), ("late", "violation"))
        self._context_tokens = self._gauge(m.CONTEXT_TOKENS)
        blocks = self._gauge(m.KV_BLOCKS)
        states = ("free", "reserved", "held", "pinned")
        self._blocks = {state: blocks.labels(state) for state in states}
        self._cached_blocks = self._gauge(m.KV_CACHED)
        self._capacity = self._gauge(m.KV_CAPACITY)
        self._gauge(m.KV_BLOCK_BYTES).set(block_bytes)

    def step_done(
        self, elapsed_s: float, num_requests: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        self._step.observe(elapsed_s)
        self._batch.observe(num_requests)
        if num_prompt_tokens:
            self._prompt_tokens.inc(num_prompt_tokens)
        if num_output_tokens:
            self._output_tokens.inc(num_output_tokens)

    def step_launched(self, path: str) -> None:
        self._launches[path].inc()

    def step_failed(self) -> None:
        self._step_failures.inc()

    def row_failed(self, reason: str) -> None:
        self._row_failures.labels(reason).inc()

    def prefix_found(self, num_tokens: int) -> None:
        self._cached_tokens.inc(num_tokens)

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def message_dropped(self, why: str) -> None:
        self._dropped[why].inc()

    def refresh(self) -> None:
        super().refresh()
        if self.now is None:
            return
        load = self.now()
        self._is_draining.set(load.is_draining)
        self._running.set(load.num_running)
        self._queued.set(load.num_waiting)
        self._queued_tokens.set(load.waiting_prompt_tokens)
        self._context_tokens.set(load.running_context_tokens)
        for state, gauge in self._blocks.items():
            gauge.set(getattr(load.kv, state))
        self._cached_blocks.set(load.kv.cached)
        self._capacity.set(load.kv.total)
        self._prefill_slowness.set(self._slowness(load.prefill_steps))
        self._decode_slowness.set(self._slowness(load.decode_steps))

    def _slowness(self, steps: LiveSteps | None) -> float:
        if steps is None or self.coefficients is None:
            return 1.0
        return steps.slowness(self.coefficients) or 1.0


class PrefillMetrics(WorkerMetrics, PrefillWatch):
    def __init__(self, name: str, *, block_bytes: int, outcomes: Sequence[str]) -> None:
        """`outcomes` are the ways in which handoffs end."""
        super().__init__(Process.PREFILL, name, block_bytes=block_bytes)
        self.num_open_handoffs: Callable[[], int] = lambda: 0
        self._queue, self._prefill = map(self._phase.labels, PREFILL_PHASES)
        self._handoffs = self._counter(m.HANDOFFS_SENT)
        for outcome in outcomes:
            self._handoffs.labels(outcome)
        self._sent_blocks = self._counter(m.SENT_BLOCKS)
        self._open_handoffs = self._gauge(m.OPEN_HANDOFFS)

    def prompt_read(self, queue_s: float, prefill_s: float) -> None:
        self._queue.observe(queue_s)
        self._prefill.observe(prefill_s)

    def blocks_sent(self, num_blocks: int) -> None:
        self._sent_blocks.inc(num_blocks)

    def handoff_ended(self, outcome: str) -> None:
        self._handoffs.labels(outcome).inc()

    def refresh(self) -> None:
        super().refresh()
        self._open_handoffs.set(self.num_open_handoffs())


class DecodeMetrics(WorkerMetrics, DecodeWatch):
    def __init__(self, name: str, *, block_bytes: int, transports: Sequence[str]) -> None:
        super().__init__(Process.DECODE, name, block_bytes=block_bytes)
        self._phases = {phase: self._phase.labels(phase) for phase in DECODE_PHASES}
        self._handoffs = self._counter(m.HANDOFFS_RECEIVED)
        for outcome in ("ok", Reason.WORKER_LOST, Reason.KV_INTEGRITY):
            self._handoffs.labels(outcome)
        self._retries = self._counter(m.HANDOFF_RETRIES)
        self._bytes = _children(self._counter(m.TRANSFER_BYTES), transports)
        self._seconds = _children(self._histogram(m.TRANSFER_SECONDS), transports)
        self._fallbacks = _children(self._counter(m.TRANSPORT_FALLBACKS), transports)
        self._pair_bytes = self._counter(m.PAIR_BYTES)
        self._corrupt_blocks = self._counter(m.CORRUPT_BLOCKS)

    def blocks_read(self, transport: str, num_bytes: int, elapsed_s: float) -> None:
        self._bytes[transport].inc(num_bytes)
        self._seconds[transport].observe(elapsed_s)

    def transport_failed(self, transport: str) -> None:
        self._fallbacks[transport].inc()

    def kv_moved(self, prefill_worker: str, transport: str, moved: KvMoved) -> None:
        for what, num_bytes in (
            ("moved", moved.moved_bytes),
            ("skipped", moved.skipped_bytes),
            ("retried", moved.retried_bytes),
        ):
            self._pair_bytes.labels(prefill_worker, transport, what).inc(num_bytes)

    def blocks_corrupt(self, num_blocks: int) -> None:
        self._corrupt_blocks.inc(num_blocks)

    def handoff_ended(self, outcome: str, *, is_retry: bool) -> None:
        self._handoffs.labels(outcome).inc()
        if is_retry:
            self._retries.inc()

    def request_done(self, timeline: PhaseTimeline) -> None:
        for phase, child in self._phases.items():
            if timeline.prefill_worker or phase not in ONLY_WITH_HANDOFF:
                child.observe(getattr(timeline, f"{phase}_s"))


def _children(metric: MetricT, values: Sequence[str]) -> dict[str, MetricT]:
    """The children of a metric with one label, each made now."""
    return {value: metric.labels(value) for value in values}
