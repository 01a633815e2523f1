"""What the router knows of one request: while it is in flight, and at its end."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.config.processes import SloClass
from pdserve.domain.errors import PdserveError
from pdserve.domain.ids import RequestId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Finished
from pdserve.observe.watch import RequestEnd
from router.cluster_view import Life, RequestShape
from router.failures import interrupted
from router.in_flight import Outcome
from router.requests import ChunkSink
from router.slo import Seen, SloResult


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """What the router knows of one request in flight: the authority on it."""

    request_id: RequestId  # unlike the client's label, never used twice
    label: str
    received_s: float
    deadline_s: float
    send: ChunkSink
    take_back: Callable[[], None] | None
    patience: asyncio.Timeout
    token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_delivered: int = 0
    submitted_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float = 0.0
    failed_lives: set[Life] = field(default_factory=set)
    verdict: PdserveError | None = None

    def stop(self, verdict: PdserveError) -> None:
        """End the request with `verdict` wherever it waits; the first verdict stands."""
        if self.verdict is None and not self.patience.expired():
            self.verdict = verdict
            self.patience.reschedule(0.0)

    def start_again(self) -> None:
        """Forget what was sent; raises `PdserveError` where that has left the process."""
        if self.num_delivered and self.take_back is None:
            raise interrupted(self.num_delivered)
        if self.take_back is not None:
            self.take_back()
        self.num_delivered = 0
        self.first_token_s = None

    @property
    def shape(self) -> RequestShape:
        return RequestShape(
            num_prompt_tokens=len(self.token_ids), max_tokens=self.sampling.max_tokens
        )

    @property
    def ttft_s(self) -> float | None:
        """Receipt to first token sent, once that is."""
        return None if self.first_token_s is None else self.first_token_s - self.received_s

    @property
    def tpot_s(self) -> float | None:
        """Mean gap between the tokens after the first, from the second one on."""
        if self.first_token_s is None or self.num_delivered < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_delivered - 1)


@dataclass(slots=True, kw_only=True, eq=False)
class Visit:
    """One call of `run`, refused ones included, for those who count."""

    received_s: float
    promise: SloClass | None = None
    outcome: Outcome = Outcome.FAILED
    reason: str = ""
    has_entered: bool = False
    record: Record | None = None
    finished: Finished | None = None

    def seen(self, now_s: float) -> Seen:
        return Seen(
            total_s=now_s - self.received_s,
            ttft_s=self.record.ttft_s if self.record else None,
            tpot_s=self.record.tpot_s if self.record else None,
        )

    def end(self, slo_result: SloResult | None, seen: Seen) -> RequestEnd:
        usage = self.finished.usage if self.finished else None
        is_sent = self.record is not None and self.record.submitted_s > 0
        return RequestEnd(
            outcome=self.outcome,
            reason=self.reason,
            slo_class=self.promise.name if self.promise else "",
            slo_result=slo_result or "",
            total_s=seen.total_s,
            queue_s=self.record.submitted_s - self.received_s if self.record and is_sent else None,
            ttft_s=seen.ttft_s,
            tpot_s=seen.tpot_s,
            num_prompt_tokens=usage.prompt_tokens if usage else 0,
            num_cached_tokens=usage.cached_prompt_tokens if usage else 0,
            num_output_tokens=self.record.num_delivered if self.record else 0,
        )
