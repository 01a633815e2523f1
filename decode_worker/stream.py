"""From sampled tokens to what the client gets: text, stops, and one message a step."""

import asyncio
from dataclasses import dataclass

from pdserve.domain.messages import RequestOutput, StepOutputs
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import FinishReason
from pdserve.engine.tokenizer import Detokenizer
from pdserve.rpc.streams import DecodeServerLink, send_or_abort


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """What one token adds."""

    text: str
    finish: FinishReason | None


class Answer:
    """One answer as it grows. Text that may be the start of a stop string is held back."""

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        eos_token_ids: tuple[int, ...],
        detokenizer: Detokenizer,
    ) -> None:
        self._sampling = sampling
        end_ids = () if sampling.ignore_eos else eos_token_ids
        self._stop_ids = frozenset((*end_ids, *sampling.stop_token_ids))
        self._detokenizer = detokenizer
        self._held_text = ""
        self.num_tokens = 0

    def push(self, token_id: int) -> AnswerPiece:
        """Add a token; a piece with `finish` is the last one."""
        can_stop = self.num_tokens >= self._sampling.min_tokens
        self.num_tokens += 1
        if can_stop and token_id in self._stop_ids:
            return self._end(FinishReason.STOP, can_stop)
        self._held_text += self._detokenizer.push(token_id)
        if can_stop and (stopped := self._cut_at_stop()) is not None:
            return AnswerPiece(stopped, FinishReason.STOP)
        if self.num_tokens == self._sampling.max_tokens:
            return self._end(FinishReason.LENGTH, can_stop)
        return AnswerPiece(self._take_safe_text(can_stop), None)

    def _end(self, reason: FinishReason, can_stop: bool) -> AnswerPiece:
        self._held_text += self._detokenizer.flush()
        if can_stop and (stopped := self._cut_at_stop()) is not None:
            return AnswerPiece(stopped, FinishReason.STOP)
        return AnswerPiece(self._held_text, reason)

    def _cut_at_stop(self) -> str | None:
        """Text before the first stop string; None if there is no stop string."""
        places = [self._held_text.find(stop) for stop in self._sampling.stop]
        first = min((place for place in places if place >= 0), default=None)
        return None if first is None else self._held_text[:first]

    def _take_safe_text(self, can_stop: bool) -> str:
        """Take the held text but for the longest end that could begin a stop string."""
        num_kept = 0
        if can_stop:
            num_kept = max(
                (_overlap(self._held_text, stop) for stop in self._sampling.stop), default=0
            )
        cut = len(self._held_text) - num_kept
        text, self._held_text = self._held_text[:cut], self._held_text[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class RouterOutbox:
    """Outputs for one router: all that one turn of the event loop adds goes in one message.

    A router that reads too slowly loses its stream, and with it all that it had here.
    """

    def __init__(self, stream: DecodeServerLink) -> None:
        self._stream = stream
        self._pending: list[RequestOutput] = []

    def add(self, output: RequestOutput) -> None:
        """Queue an output; never waits."""
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append(output)

    def _flush(self) -> None:
        outputs, self._pending = tuple(self._pending), []
        send_or_abort(self._stream, StepOutputs(outputs))
