"""What the parts of a process tell whoever watches it; plain calls, so that they stay testable.

The bases do nothing: they are for whoever is not watched. `pdserve.observe.prometheus` counts.
All calls are made on the event loop, are cheap and never raise.
"""

from dataclasses import dataclass

from pdserve.domain.messages import KvMoved
from pdserve.domain.tokens import PhaseTimeline


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd:
    """A request has ended at the router; seconds of the router's clock, None where it got no
    first token (`ttft_s`), no second (`tpot_s`), or never went to a worker (`queue_s`).
    """

    outcome: str  # completed | failed | cancelled | refused
    reason: str  # how the answer ended, or why there is none
    slo_class: str  # "" where the router has no classes
    slo_result: str  # "" where it is not judged
    total_s: float
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


class RouterWatch:
    def request_ended(self, end: RequestEnd) -> None:
        """Called once for each request, refused ones included."""

    def attempt_failed(self, reason: str) -> None:
        """A worker's fault ended one try at a request."""


class WorkerWatch:
    """What both kinds of worker do."""

    def step_done(
        self, elapsed_s: float, num_requests: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """One engine step: what it computed and sampled."""

    def step_launched(self, path: str) -> None:
        """How one engine step went to the device: a `StepPath`."""

    def step_failed(self) -> None:
        """One engine step raised; its sequences are run again one by one."""

    def row_failed(self, reason: str) -> None:
        """One row of a step gave no token, or its sequence raised: its request ends."""

    def prefix_found(self, num_tokens: int) -> None:
        """So many tokens of a prompt are in this worker's prefix cache."""

    def refused(self, reason: str) -> None:
        """Something was turned away here."""

    def message_dropped(self, why: str) -> None:
        """A message of the other role about a handoff: `late`, or a `violation` of the protocol."""


class PrefillWatch(WorkerWatch):
    def prompt_read(self, queue_s: float, prefill_s: float) -> None:
        """A prompt was read to its first token."""

    def blocks_sent(self, num_blocks: int) -> None:
        """A decode worker has pulled these."""

    def handoff_ended(self, outcome: str) -> None:
        """The phase that a handoff ended in."""


class DecodeWatch(WorkerWatch):
    def blocks_read(self, transport: str, num_bytes: int, elapsed_s: float) -> None:
        """Blocks of one offer were read from a peer and checked, right or not."""

    def transport_failed(self, transport: str) -> None:
        """A read by this transport failed, and the next one took it over."""

    def kv_moved(self, prefill_worker: str, transport: str, moved: KvMoved) -> None:
        """What one handoff read of a prefill worker, and what it did not have to."""

    def blocks_corrupt(self, num_blocks: int) -> None:
        """These did not match their digests."""

    def handoff_ended(self, outcome: str, *, is_retry: bool) -> None:
        """`outcome` is ok, or why it failed."""

    def request_done(self, timeline: PhaseTimeline) -> None:
        """A request got its whole answer."""


NO_PREFILL_WATCH = PrefillWatch()
NO_DECODE_WATCH = DecodeWatch()
