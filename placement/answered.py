"""One answer of a cluster that is measured, as the client saw it."""

from dataclasses import dataclass

from pdserve.domain.tokens import Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """When it was asked for, or was to be, and when each token came."""

    prompt_tokens: int
    sent_s: float
    token_s: tuple[float, ...]
    finished: Finished

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def handoff_s(self) -> float:
        """The part of TTFT in which no worker read or queued the prompt."""
        timeline = self.finished.timeline
        return max(0.0, self.ttft_s - timeline.prefill_queue_s - timeline.prefill_s)

    @property
    def was_handed_off(self) -> bool:
        return bool(self.finished.timeline.prefill_worker) and (
            self.finished.usage.cached_prompt_tokens == 0
        )
