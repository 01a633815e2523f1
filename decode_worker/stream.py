"""From sampled tokens to what the client gets: text, stops, and one message a step."""

import asyncio
from dataclasses import dataclass

from decode_worker.stop_strings import StopStrings
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
        self._text = StopStrings(sampling.stop, is_included=sampling.include_stop_str_in_output)
        self.num_tokens = 0

    def push(self, token_id: int) -> AnswerPiece:
        """Add a token; a piece with `finish` is the last one."""
        can_stop = self.num_tokens >= self._sampling.min_tokens
        is_stop = can_stop and token_id in self._stop_ids
        self.num_tokens += 1
        has_text = not is_stop or self._sampling.include_stop_str_in_output
        if has_text:
            self._text.add(self._detokenizer.push(token_id))
        if not has_text or self._detokenizer.skips_special_tokens:
            self._text.add_hidden(self._detokenizer.special_text(token_id))
        is_last = self.num_tokens == self._sampling.max_tokens
        if is_stop or is_last:
            self._text.add(self._detokenizer.flush())
        if can_stop and (stopped := self._text.cut()) is not None:
            return AnswerPiece(stopped, FinishReason.STOP)
        if is_stop or is_last:
            reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
            return AnswerPiece(self._text.take_all(), reason)
        return AnswerPiece(self._text.take_safe() if can_stop else self._text.take_all(), None)


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
