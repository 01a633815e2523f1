"""A step's batch, and what was drawn, as messages between ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from pdserve.domain.errors import Reason
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.contract import Drawn, SampleStep, SequenceStep, StepBatch
from pdserve.engine.ranks.frames import Message

_KEPT_OF_STOPS = {"stop": (), "skip_special_tokens": True, "include_stop_str_in_output": False}
"""What decides about an answer's text is no matter of ranks, which draw tokens: it stays here."""
_NO_SAMPLE = -1

Ints = npt.NDArray[np.int64]


def batch_message(batch: StepBatch) -> Message:
    """Six numbers a sequence, then all tokens, then all block tables; each set of params once.

    No sequence follows a draw: see `RankedEngine`.
    """
    known: dict[SamplingParams, int] = {}
    numbers = np.empty((len(batch.sequences), 6), dtype=np.int64)
    for row, each in zip(numbers, batch.sequences, strict=True):
        sample = each.sample
        place = _NO_SAMPLE if sample is None else known.setdefault(sample.params, len(known))
        row[:] = (
            len(each.token_ids),
            each.start,
            len(each.block_table),
            each.num_tokens,
            place,
            sample.token_index if sample is not None else 0,
        )
    flat = [token for each in batch.sequences for token in each.token_ids]
    flat += [block for each in batch.sequences for block in each.block_table]
    body = numbers.tobytes() + np.array(flat, dtype=np.int64).tobytes()
    params = [{**asdict(each), **_KEPT_OF_STOPS} for each in known]
    return Message({"num_sequences": len(batch.sequences), "params": params}, body)


def batch_of(message: Message) -> StepBatch:
    words = np.frombuffer(message.body, dtype=np.int64)
    count = int(message.fields["num_sequences"])
    numbers = words[: 6 * count].reshape(count, 6)
    params = [_params_of(each) for each in message.fields["params"]]
    tokens = _parts(words[6 * count :], numbers[:, 0])
    tables = _parts(words[6 * count + int(numbers[:, 0].sum()) :], numbers[:, 2])
    return StepBatch(
        tuple(
            SequenceStep(
                token_ids=token_ids,
                start=start,
                block_table=tuple(map(BlockId, table)),
                sample=None
                if place == _NO_SAMPLE
                else SampleStep(params=params[place], token_index=token_index),
                num_tokens=num_tokens,
            )
            for token_ids, table, (_, start, _, num_tokens, place, token_index) in zip(
                tokens, tables, numbers.tolist(), strict=True
            )
        )
    )


def drawn_message(sampled: Sequence[Drawn | None]) -> Message:
    return Message({"drawn": [_drawn_fields(each) for each in sampled]})


def drawn_of(message: Message) -> tuple[Drawn | None, ...]:
    return tuple(map(_drawn_of, message.fields["drawn"]))


def _params_of(given: Mapping[str, Any]) -> SamplingParams:
    """JSON has lists where the params have tuples."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return SamplingParams(**values)


def _parts(words: Ints, sizes: Ints) -> list[tuple[int, ...]]:
    ends = np.cumsum(sizes).tolist()
    flat = words[: ends[-1] if ends else 0].tolist()
    return [tuple(flat[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]


def _drawn_fields(drawn: Drawn | None) -> Any:
    if drawn is None:
        return None
    if isinstance(drawn, Failed):
        return asdict(drawn)
    if drawn.logprob is None:
        return drawn.token_id
    return [drawn.token_id, drawn.logprob, drawn.top_logprobs]


def _drawn_of(given: Any) -> Drawn | None:
    match given:
        case None:
            return None
        case int(token_id):
            return SampledToken(token_id)
        case [int(token_id), logprob, list(others)]:
            return SampledToken(
                token_id, float(logprob), tuple((int(a), float(b)) for a, b in others)
            )
        case {"reason": str(reason), "message": str(text), "retry_after_s": retry_after_s}:
            return Failed(reason=Reason(reason), message=text, retry_after_s=retry_after_s)
    raise ValueError("what another rank drew is neither a token nor a failure")
