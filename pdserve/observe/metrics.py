"""Every metric that a pdserve process exposes: one table, from which all else is made.

`pdserve.observe.prometheus` builds its objects from these rows and `docs/metrics.md` shows them.
Label values come from code, settings or enumerations, never from a request: a label with one value
for each prompt or request would grow Prometheus without bound, and tell what clients sent.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial


class Process(StrEnum):
    """Which of the three kinds of process exposes a metric."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


ALL = (Process.ROUTER, Process.PREFILL, Process.DECODE)
WORKERS = (Process.PREFILL, Process.DECODE)
ROUTER = (Process.ROUTER,)
PREFILL = (Process.PREFILL,)
DECODE = (Process.DECODE,)

# Chat over one GPU answers in 0.1 to 1 s, a cached prompt on a small model in 5 ms, a long prompt
# behind a queue in half a minute: steps of about 1.5 to 2 from 1 ms to 60 s keep a percentile's
# error below the width of a step anywhere in between.
TTFT_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
)
# A small model makes a token in 1 ms, a person reads one in 50 to 200 ms: steps are finest there,
# where objectives are set.
TPOT_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0),
)
# Whole answers: from one token of a cached prompt to thousands of tokens.
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0),
    *(45.0, 60.0, 120.0, 300.0, 600.0),
)
# Messages between processes take 0.1 ms, waiting in a queue up to `timers.queue_s`, decoding
# minutes. There are eight phases: fewer steps each.
PHASE_BUCKETS = (
    *(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
)
# One step of a small model takes 1 ms, one with thousands of prompt tokens seconds.
STEP_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1),
    *(0.2, 0.5, 1.0, 2.0, 5.0),
)
TRANSFER_BUCKETS = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
BATCH_BUCKETS = (*(float(2**power) for power in range(11)),)
LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One row: `name` is the one that Prometheus stores, so a counter's ends in `_total`."""

    name: str
    kind: Kind
    help: str
    processes: tuple[Process, ...]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _metric(
    kind: Kind,
    name: str,
    processes: tuple[Process, ...],
    text: str,
    *labels: str,
    buckets: tuple[float, ...] = (),
) -> MetricSpec:
    return MetricSpec(
        name=name, kind=kind, help=text, processes=processes, labels=labels, buckets=buckets
    )


_counter = partial(_metric, Kind.COUNTER)
_gauge = partial(_metric, Kind.GAUGE)
_histogram = partial(_metric, Kind.HISTOGRAM)

# What clients get ---------------------------------------------------------------------------------

TTFT = _histogram(
    "pdserve_ttft_seconds",
    ROUTER,
    "From a request's receipt to its first token sent, of requests that got one",
    "slo_class",
    buckets=TTFT_BUCKETS,
)
TPOT = _histogram(
    "pdserve_tpot_seconds",
    ROUTER,
    "Mean gap between a request's tokens after the first, of requests that got two or more",
    "slo_class",
    buckets=TPOT_BUCKETS,
)
REQUEST = _histogram(
    "pdserve_request_seconds",
    ROUTER,
    "From a request's receipt to its end, of completed requests",
    "slo_class",
    buckets=REQUEST_BUCKETS,
)
PHASE = _histogram(
    "pdserve_phase_seconds",
    ALL,
    "One phase of a request, at the process that it passes in: router_queue; prefill_queue, "
    "prefill; reserve, transfer, handoff_wait, decode_queue, decode",
    "phase",
    buckets=PHASE_BUCKETS,
)
SLO_REQUESTS = _counter(
    "pdserve_slo_requests_total",
    ROUTER,
    "Judged requests by class and result: met, missed_ttft, missed_tpot, missed_both, failed, "
    "refused",
    "slo_class",
    "result",
)
SLO_LIMIT = _gauge(
    "pdserve_slo_limit_seconds",
    ROUTER,
    "What a class promises; metric is ttft or tpot",
    "slo_class",
    "metric",
)
SLO_TARGET = _gauge(
    "pdserve_slo_target_ratio",
    ROUTER,
    "Share of a class's requests that must meet both promises",
    "slo_class",
)

# Requests -----------------------------------------------------------------------------------------

REQUESTS = _counter(
    "pdserve_requests_total",
    ROUTER,
    "Ended requests by outcome (completed, failed, cancelled, refused) and reason",
    "outcome",
    "reason",
)
REFUSALS = _counter(
    "pdserve_refusals_total",
    ALL,
    "What this process refused, by reason: requests (router), handoffs (prefill), requests that "
    "the router sent on (decode)",
    "reason",
)
FAILED_ATTEMPTS = _counter(
    "pdserve_failed_attempts_total",
    ROUTER,
    "Tries at a request that ended by a worker's fault, by reason; most are tried again elsewhere",
    "reason",
)
IN_FLIGHT = _gauge("pdserve_requests_in_flight", ROUTER, "Requests taken and not ended")
WAITING = _gauge(
    "pdserve_requests_waiting",
    ROUTER,
    "Requests sent to workers whose first token is not there yet: what max_num_waiting limits",
)
PROMPT_TOKENS = _counter(
    "pdserve_prompt_tokens_total", ROUTER, "Prompt tokens of completed requests"
)
CACHED_TOKENS = _counter(
    "pdserve_cached_prompt_tokens_total",
    ROUTER,
    "Of those, tokens whose KV was found in a prefix cache",
)
OUTPUT_TOKENS = _counter(
    "pdserve_output_tokens_total", ROUTER, "Tokens sent on to clients, whatever the request's end"
)

# The cluster --------------------------------------------------------------------------------------

WORKERS_BY_HEALTH = _gauge(
    "pdserve_workers",
    ROUTER,
    "Registered workers by role (prefill, decode) and health (joining, alive, suspect, draining)",
    "role",
    "health",
)
BUILD = _gauge(
    "pdserve_build_info",
    ALL,
    "Always 1; the labels say what runs here",
    "version",
    "wire_version",
    "process",
    "name",
)
DRAINING = _gauge(
    "pdserve_draining", ALL, "1 while the process finishes what it has, before its end"
)
LOOP_LAG = _histogram(
    "pdserve_event_loop_lag_seconds",
    ALL,
    "How late the event loop woke up, asked four times a second: high while one callback blocks it",
    buckets=LAG_BUCKETS,
)
DROPPED_LOG_LINES = _counter(
    "pdserve_log_lines_dropped_total",
    ALL,
    "Log lines that could not be written: the disk is full, or nobody reads the pipe",
)

# Engines ------------------------------------------------------------------------------------------

STEP = _histogram(
    "pdserve_engine_step_seconds",
    WORKERS,
    "One engine step",
    buckets=STEP_BUCKETS,
)
BATCH = _histogram(
    "pdserve_engine_batch_requests",
    WORKERS,
    "Requests in one engine step: the batch size",
    buckets=BATCH_BUCKETS,
)
STEP_LAUNCHES = _counter(
    "pdserve_step_launches_total",
    WORKERS,
    "Engine steps by how their operators were launched: one by one (eager), or as one that was "
    "recorded (graph; decode steps on a GPU)",
    "path",
)
STEP_FAILURES = _counter(
    "pdserve_engine_step_failures_total",
    WORKERS,
    "Engine steps that raised; their sequences are run again one by one",
)
ROW_FAILURES = _counter(
    "pdserve_engine_row_failures_total",
    WORKERS,
    "Requests that the engine failed on, each alone, by reason: UNUSABLE_LOGITS (NaN, infinite, or "
    "all ruled out), INTERNAL (an error)",
    "reason",
)
STEP_SLOWNESS = _gauge(
    "pdserve_engine_step_slowness_ratio",
    WORKERS,
    "How many times longer recent steps take than was measured at start or given, by kind: prefill "
    "(with prompt tokens), decode (without); 1 until there were enough steps",
    "kind",
)
ENGINE_PROMPT_TOKENS = _counter(
    "pdserve_engine_prompt_tokens_total", WORKERS, "Prompt tokens computed here"
)
ENGINE_CACHED_TOKENS = _counter(
    "pdserve_engine_cached_tokens_total",
    WORKERS,
    "Prompt tokens that need not be computed: their KV was in this worker's prefix cache",
)
ENGINE_OUTPUT_TOKENS = _counter(
    "pdserve_engine_output_tokens_total", WORKERS, "Output tokens sampled here"
)
RUNNING = _gauge(
    "pdserve_running_requests",
    WORKERS,
    "Requests being computed; at a decode worker also those whose KV is on its way",
)
QUEUED = _gauge(
    "pdserve_queued_requests", WORKERS, "Requests that wait for KV blocks or a place in the batch"
)
QUEUED_TOKENS = _gauge(
    "pdserve_queued_prompt_tokens",
    WORKERS,
    "Prompt tokens not computed yet, of requests that wait or are read",
)
CONTEXT_TOKENS = _gauge(
    "pdserve_running_context_tokens", WORKERS, "Tokens with KV here, of running requests"
)

# KV memory and its transfer -----------------------------------------------------------------------

KV_BLOCKS = _gauge(
    "pdserve_kv_blocks",
    WORKERS,
    "KV blocks by state: free, reserved, held, pinned; their sum is pdserve_kv_blocks_capacity",
    "state",
)
KV_CACHED = _gauge(
    "pdserve_kv_blocks_cached", WORKERS, "Of the free blocks, those that hold a prefix to use again"
)
KV_CAPACITY = _gauge("pdserve_kv_blocks_capacity", WORKERS, "KV blocks of this worker")
KV_BLOCK_BYTES = _gauge("pdserve_kv_block_bytes", WORKERS, "Size of one KV block")
DROPPED_MESSAGES = _counter(
    "pdserve_handoff_messages_dropped_total",
    WORKERS,
    "Messages about handoffs that were dropped: late (over here when it came, or said before; "
    "some are usual, since messages cross) or violation (no correct peer sends it)",
    "why",
)
OPEN_HANDOFFS = _gauge(
    "pdserve_handoffs_open", PREFILL, "Handoffs under a lease: read or offered, and not over"
)
HANDOFFS_SENT = _counter(
    "pdserve_handoffs_sent_total",
    PREFILL,
    "Ended handoffs by outcome: completed, abandoned (the decode worker needed no more), failed, "
    "expired (lease), lost (stream)",
    "outcome",
)
SENT_BLOCKS = _counter(
    "pdserve_kv_sent_blocks_total", PREFILL, "KV blocks that decode workers said they have pulled"
)
HANDOFFS_RECEIVED = _counter(
    "pdserve_handoffs_received_total",
    DECODE,
    "Ended handoffs by outcome: ok, else the reason of the failure",
    "outcome",
)
HANDOFF_RETRIES = _counter(
    "pdserve_handoff_retries_total",
    DECODE,
    "Handoffs asked of another prefill worker after one failed",
)
TRANSFER_BYTES = _counter(
    "pdserve_kv_transfer_bytes_total",
    DECODE,
    "KV read from prefill workers, second reads included",
    "transport",
)
TRANSFER_SECONDS = _histogram(
    "pdserve_kv_transfer_seconds",
    DECODE,
    "Reading and checking the blocks of one offer",
    "transport",
    buckets=TRANSFER_BUCKETS,
)
TRANSPORT_FALLBACKS = _counter(
    "pdserve_kv_transport_fallbacks_total",
    DECODE,
    "Reads by rank 0 that this transport failed and the next one took over",
    "transport",
)
PAIR_BYTES = _counter(
    "pdserve_kv_pair_bytes_total",
    DECODE,
    "KV by prefill worker: moved (second reads included), skipped (not asked for, since it was "
    "here), retried (of those moved: read again, since they did not match their digests)",
    "prefill_worker",
    "transport",
    "what",
)
CORRUPT_BLOCKS = _counter(
    "pdserve_kv_corrupt_blocks_total", DECODE, "Blocks read that did not match their digest"
)

OWN_METRICS = tuple(each for each in tuple(vars().values()) if isinstance(each, MetricSpec))

# From the library's process collector, where the system has /proc ---------------------------------

PROCESS_METRICS = (
    _counter("process_cpu_seconds_total", ALL, "CPU time, user and system"),
    _gauge("process_resident_memory_bytes", ALL, "Resident memory"),
    _gauge("process_virtual_memory_bytes", ALL, "Virtual memory"),
    _gauge("process_start_time_seconds", ALL, "When the process started, in Unix time"),
    _gauge("process_open_fds", ALL, "Open file descriptors"),
    _gauge("process_max_fds", ALL, "The most that may be open"),
)
METRICS = (*OWN_METRICS, *PROCESS_METRICS)
