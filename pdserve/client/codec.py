"""Protobuf of the public and the operators' service to values and back."""

import dataclasses

from pdserve.client.values import Answer, Chunk, Finished, Model, Prompt, Sampling, Usage
from pdserve.domain.errors import BadRequest, FieldViolation
from pdserve.domain.ids import Epoch, WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import ClusterState, Role, WorkerHello, WorkerLoad, WorkerState
from pdserve.domain.tokens import FinishReason, PhaseTimeline, SampledToken
from pdserve.v1 import inference_pb2, membership_pb2, types_pb2

FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
ROLES = {membership_pb2.ROLE_PREFILL: Role.PREFILL, membership_pb2.ROLE_DECODE: Role.DECODE}
MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1


def request_to_proto(
    prompt: Prompt, sampling: Sampling, *, model: str, request_id: str
) -> inference_pb2.GenerateRequest:
    """Raises `BadRequest` for what protobuf cannot carry; all other limits are the server's."""
    _check_representable(prompt, sampling)
    message = inference_pb2.GenerateRequest(
        model=model, request_id=request_id, sampling=_sampling_to_proto(sampling)
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.CopyFrom(types_pb2.TokenIds(ids=prompt))
    return message


def chunk_from_proto(message: inference_pb2.GenerateChunk) -> Chunk:
    return Chunk(
        first_index=message.first_index,
        tokens=tuple(map(_token_from_proto, message.tokens)),
        text=message.text,
        request_id=message.request_id,
        finished=(_finished_from_proto(message.finished) if message.HasField("finished") else None),
    )


def answer_from_proto(message: inference_pb2.CompleteResponse) -> Answer:
    return Answer(
        request_id=message.request_id,
        tokens=tuple(map(_token_from_proto, message.tokens)),
        text=message.text,
        finished=_finished_from_proto(message.finished),
    )


def model_from_proto(message: inference_pb2.Model) -> Model:
    return Model(
        name=message.name,
        max_context_tokens=message.max_context_tokens,
        vocab_size=message.vocab_size,
    )


def cluster_state_from_proto(message: membership_pb2.ClusterState) -> ClusterState:
    return ClusterState(
        router_id=message.router_id,
        model_name=message.model_name,
        public_address=message.public_address,
        uptime_s=message.uptime_s,
        num_in_flight=message.num_in_flight,
        num_completed=message.num_completed,
        num_failed=message.num_failed,
        num_cancelled=message.num_cancelled,
        num_refused=message.num_refused,
        workers=tuple(map(_worker_from_proto, message.workers)),
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


def _sampling_to_proto(sampling: Sampling) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(
        **{field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    )


def _token_from_proto(message: types_pb2.Token) -> SampledToken:
    if not message.HasField("logprob"):
        return SampledToken(message.id)
    top = tuple((entry.token_id, entry.logprob) for entry in message.top_logprobs)
    return SampledToken(message.id, message.logprob, top)


def _finished_from_proto(message: inference_pb2.Finished) -> Finished:
    usage, timeline = message.usage, message.timeline
    return Finished(
        # A reason of a later release is shown as the nearest thing that this one knows.
        reason=FINISH_REASONS.get(message.reason, FinishReason.STOP),
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            seed=usage.seed,
        ),
        timeline=PhaseTimeline(
            **{
                field.name: getattr(timeline, field.name)
                for field in dataclasses.fields(PhaseTimeline)
            }
        ),
    )


def _worker_from_proto(message: membership_pb2.WorkerState) -> WorkerState:
    return WorkerState(
        hello=_hello_from_proto(message.hello),
        load=_load_from_proto(message.load),
        health=message.health,
        silence_s=message.silence_s,
        num_assigned=message.num_assigned,
    )


def _hello_from_proto(message: membership_pb2.WorkerHello) -> WorkerHello:
    coefficients = message.coefficients
    return WorkerHello(
        worker_id=WorkerId(message.worker_id),
        role=ROLES.get(message.role, Role.DECODE),
        epoch=Epoch(message.epoch),
        protocol_version=message.protocol_version,
        address=message.address,
        pid=message.pid,
        model_name=message.model_name,
        model_hash=message.model_hash,
        layout_hash=message.layout_hash,
        tokenizer_hash=message.tokenizer_hash,
        max_context_tokens=message.max_context_tokens,
        vocab_size=message.vocab_size,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        block_bytes=message.block_bytes,
        max_num_requests=message.max_num_requests,
        max_step_tokens=message.max_step_tokens,
        engine=message.engine,
        coefficients=StepCoefficients(
            **{
                field.name: getattr(coefficients, field.name)
                for field in dataclasses.fields(StepCoefficients)
            }
        ),
    )


def _load_from_proto(message: membership_pb2.WorkerLoad) -> WorkerLoad:
    kv = message.kv
    return WorkerLoad(
        sequence=message.sequence,
        num_waiting=message.num_waiting,
        num_running=message.num_running,
        waiting_prompt_tokens=message.waiting_prompt_tokens,
        running_context_tokens=message.running_context_tokens,
        kv=KvUsage(
            free=kv.free,
            reserved=kv.reserved,
            held=kv.held,
            pinned=kv.pinned,
            total=kv.total,
            cached=kv.cached,
        ),
        is_draining=message.is_draining,
        num_steps=message.num_steps,
        num_tokens=message.num_tokens,
        transferred_bytes=message.transferred_bytes,
        num_corrupt_blocks=message.num_corrupt_blocks,
    )
