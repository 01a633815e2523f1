"""One request at its owner: what it asked for, what it has, and when each phase was passed."""

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from decode_worker.stream import Answer, RouterOutbox
from pdserve.domain.kv_demand import num_answer_kv_tokens
from pdserve.domain.lengths import ONE_REGIME, LengthRule
from pdserve.domain.messages import RequestOutput, Submit
from pdserve.domain.tokens import (
    Completed,
    Failed,
    FinishReason,
    PhaseTimeline,
    SampledToken,
)
from pdserve.engine.step_table import StepTable

Clock = Callable[[], float]


@dataclass(slots=True, kw_only=True)
class PhaseClock:
    """Readings of this process's clock, and what the prefill worker reported; seconds."""

    received_s: float
    reserved_s: float = 0.0
    first_read_s: float = 0.0  # the first block was asked for
    landed_s: float = 0.0  # the last block was checked
    joined_s: float = 0.0  # ready to be computed here
    first_step_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    prefill_worker: str = ""
    transferred_bytes: int = 0

    def timeline(self, decode_worker: str) -> PhaseTimeline:
        def between(start_s: float, end_s: float) -> float:
            return max(0.0, end_s - start_s) if start_s and end_s else 0.0

        return PhaseTimeline(
            reserve_s=between(self.received_s, self.reserved_s),
            prefill_queue_s=self.prefill_queue_s,
            prefill_s=self.prefill_s,
            transfer_s=between(self.first_read_s, self.landed_s),
            handoff_wait_s=between(self.first_token_s, self.landed_s),
            decode_queue_s=between(self.joined_s, self.first_step_s),
            decode_s=between(self.first_step_s, self.ended_s),
            ttft_s=between(self.received_s, self.first_token_s),
            total_s=between(self.received_s, self.ended_s),
            prefill_worker=self.prefill_worker,
            decode_worker=decode_worker,
            transferred_bytes=self.transferred_bytes,
        )


class DecodeRequest:
    """Owned by the task that runs it; the decode loop only appends tokens.

    `token_ids` is the prompt and every output token; KV of the first `num_computed_tokens` of
    them is in `table`. Whatever is beyond is computed next, and where that reaches the end one
    more token is sampled: a plain decode step is the case of one.
    """

    def __init__(
        self,
        submit: Submit,
        *,
        answer: Answer,
        outbox: RouterOutbox,
        names: tuple[bytes, ...],
        clock: Clock,
        length_rule: LengthRule = ONE_REGIME,
    ) -> None:
        self.submit = submit
        self._length_rule = length_rule
        self.names = names  # of the prompt's full blocks
        self.token_ids = list(submit.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # found here or at the prefill worker
        self.table: StepTable | None = None
        self.times = PhaseClock(received_s=clock())
        self.finished: asyncio.Future[FinishReason] = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._outbox = outbox
        self._clock = clock
        self._last_output: RequestOutput | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.submit.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_left_tokens(self) -> int:
        """Of the answer, at most."""
        return self.submit.sampling.max_tokens - self.num_output_tokens

    @property
    def is_answered(self) -> bool:
        """The last token is there, and only `complete` is left to be called."""
        return self._last_output is not None

    @property
    def max_num_kv_tokens(self) -> int:
        return num_answer_kv_tokens(self.num_prompt_tokens, self.submit.sampling.max_tokens)

    def take(self, token: SampledToken) -> None:
        """Add a sampled token; sends it, unless it ends the answer: `complete` sends that one."""
        now_s = self._clock()
        if self.num_output_tokens == 0:
            self.times.first_token_s = now_s
        piece = self._answer.push(token.token_id)
        output = RequestOutput(
            request_id=self.submit.request_id,
            attempt=self.submit.attempt,
            first_index=self.num_output_tokens,
            tokens=(token,),
            text=piece.text,
        )
        self.token_ids.append(token.token_id)
        if piece.finish is None:
            self._outbox.add(output)
            return
        self.times.ended_s = now_s
        self._last_output = output
        self.finished.set_result(piece.finish)

    def follow_length(self) -> None:
        """If the last token took the request past a switch, its KV is to be computed again.

        Its blocks are its own then: a request that may pass a switch has no names.
        """
        num_before = max(len(self.token_ids) - 1, self.num_prompt_tokens)
        if self._length_rule.is_recomputed(num_before, len(self.token_ids)):
            self.num_computed_tokens = 0

    def complete(self, decode_worker: str) -> PhaseTimeline:
        """Send the last token and the end; called once, after the blocks are given back."""
        assert self._last_output is not None
        completed = Completed(
            reason=self.finished.result(),
            cached_prompt_tokens=self.num_cached_tokens,
            timeline=self.times.timeline(decode_worker),
        )
        self._outbox.add(dataclasses.replace(self._last_output, end=completed))
        return completed.timeline

    def fail(self, failure: Failed) -> None:
        """Send the end of a request that has no answer, or only part of one."""
        self._outbox.add(
            RequestOutput(
                request_id=self.submit.request_id,
                attempt=self.submit.attempt,
                first_index=self.num_output_tokens,
                end=failure,
            )
        )
