"""Protobuf of the public service to values and back, as a client sees it."""

from pdserve.client.values import Answer, Chunk, Prompt, Sampling
from pdserve.domain.errors import BadRequest, FieldViolation
from pdserve.domain.tokens import Finished, FinishReason, PhaseTimeline, Usage
from pdserve.rpc.alike import message_of, value_of
from pdserve.rpc.codec import FINISH_FROM_PROTO, token_from_proto
from pdserve.v1 import inference_pb2, types_pb2

MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1


def request_to_proto(
    prompt: Prompt,
    sampling: Sampling,
    *,
    model: str,
    request_id: str,
    slo_class: str = "",
    add_special_tokens: bool | None = None,
) -> inference_pb2.GenerateRequest:
    """Raises `BadRequest` for what protobuf cannot carry; all other limits are the server's."""
    _check_representable(prompt, sampling)
    if not _is_unicode(slo_class):
        raise BadRequest.of([FieldViolation("slo_class", "is not valid Unicode text")])
    message = inference_pb2.GenerateRequest(
        model=model,
        request_id=request_id,
        sampling=message_of(types_pb2.SamplingParams, sampling),
        slo_class=slo_class,
        add_special_tokens=add_special_tokens,
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.CopyFrom(types_pb2.TokenIds(ids=prompt))
    return message


def chunk_from_proto(message: inference_pb2.GenerateChunk) -> Chunk:
    return value_of(
        Chunk,
        message,
        tokens=tuple(map(token_from_proto, message.tokens)),
        finished=_finished_from_proto(message.finished) if message.HasField("finished") else None,
    )


def answer_from_proto(message: inference_pb2.CompleteResponse) -> Answer:
    return value_of(
        Answer,
        message,
        tokens=tuple(map(token_from_proto, message.tokens)),
        finished=_finished_from_proto(message.finished),
    )


def _check_representable(prompt: Prompt, sampling: Sampling) -> None:
    violations: list[FieldViolation] = []

    def check(name: str, value: int | None, maximum: int) -> None:
        if value is not None and not 0 <= value <= maximum:
            rule = f"must be from 0 to {maximum}; got {value}"
            violations.append(FieldViolation(name, rule))

    for name in ("top_k", "max_tokens", "min_tokens", "logprobs"):
        check(f"sampling.{name}", getattr(sampling, name), MAX_UINT32)
    check("sampling.seed", sampling.seed, MAX_UINT64)
    for token_id in sampling.stop_token_ids:
        check("sampling.stop_token_ids", token_id, MAX_UINT32)
    if isinstance(prompt, str):
        if not _is_unicode(prompt):
            violations.append(FieldViolation("prompt", "is not valid Unicode text"))
    else:
        for token_id in prompt:
            check("prompt.token_ids", token_id, MAX_UINT32)
    if not all(map(_is_unicode, sampling.stop)):
        violations.append(FieldViolation("sampling.stop", "is not valid Unicode text"))
    if violations:
        raise BadRequest.of(violations)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finished_from_proto(message: inference_pb2.Finished) -> Finished:
    return Finished(
        # A reason of a later release is shown as the nearest thing that this one knows.
        reason=FINISH_FROM_PROTO.get(message.reason, FinishReason.STOP),
        usage=value_of(Usage, message.usage),
        timeline=value_of(PhaseTimeline, message.timeline),
    )
