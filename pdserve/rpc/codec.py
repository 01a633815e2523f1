"""Values to protobuf and back, for the streams between router, decode and prefill workers.

`from_*` functions raise `ValueError` for a message that makes no sense; its sender is a peer, so
that is counted and dropped, never a crash.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from pdserve.domain import messages as m
from pdserve.domain.errors import Reason
from pdserve.domain.ids import HandoffId, RequestId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import (
    Completed,
    Failed,
    FinishReason,
    PhaseTimeline,
    SampledToken,
    slices,
)
from pdserve.rpc.alike import message_of, value_of
from pdserve.rpc.layout_codec import layout_from_proto, layout_to_proto
from pdserve.v1 import decode_pb2, prefill_pb2, types_pb2

FINISH_TO_PROTO = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
}
REASONS = frozenset(Reason)
MAX_NUM_REGIONS_OF_RANK = 16
"""One for each transport."""
FINISH_FROM_PROTO = {number: reason for reason, number in FINISH_TO_PROTO.items()}


def num_prompt_tokens(message: object) -> int:
    """Of a message, as a value or in protobuf, that holds a prompt; else 0."""
    match message:
        case m.Submit() | m.StartHandoff():
            return len(message.prompt_token_ids)
        case decode_pb2.RouterMessage():
            return len(message.submit.prompt_token_ids)
        case prefill_pb2.DecodeToPrefill():
            return len(message.start.prompt_token_ids)
        case _:
            return 0


# Shared parts -------------------------------------------------------------------------------------


def _extend(field: Any, token_ids: Sequence[int]) -> None:
    """Add a prompt to a repeated field, in slices: see `pdserve.rpc.off_loop`."""
    for part in slices(token_ids):
        field.extend(part)


def _tuple_of(field: Any) -> tuple[int, ...]:
    """The reverse of `_extend`."""
    return tuple(itertools.chain.from_iterable(slices(field)))


def sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take the defaults of `SamplingParams`."""
    fields = ("temperature", "top_k", "top_p", "seed", "max_tokens", "min_tokens", "logprobs")
    given = {
        name: getattr(message, name)
        for name in (*fields, "skip_special_tokens")
        if message.HasField(name)
    }
    return SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_str_in_output=message.include_stop_str_in_output,
    )


def token_to_proto(token: SampledToken) -> types_pb2.Token:
    if token.logprob is None:
        return types_pb2.Token(id=token.token_id)
    top = [types_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in token.top_logprobs]
    return types_pb2.Token(id=token.token_id, logprob=token.logprob, top_logprobs=top)


def token_from_proto(message: types_pb2.Token) -> SampledToken:
    if not message.HasField("logprob"):
        return SampledToken(message.id)
    top = tuple((entry.token_id, entry.logprob) for entry in message.top_logprobs)
    return SampledToken(message.id, message.logprob, top)


def failure_from_proto(message: types_pb2.Failure) -> Failed:
    # A peer of another version may know more reasons; its request ends all the same.
    reason = Reason(message.reason) if message.reason in REASONS else Reason.INTERNAL
    return value_of(Failed, message, reason=reason)


# Router and decode worker -------------------------------------------------------------------------


def router_message_to_proto(message: m.RouterToDecode) -> decode_pb2.RouterMessage:
    match message:
        case m.PeerHello():
            hello = decode_pb2.RouterHello(
                router_id=message.peer_id,
                epoch=message.epoch,
                protocol_version=message.protocol_version,
            )
            return decode_pb2.RouterMessage(hello=hello)
        case m.Submit():
            submit = decode_pb2.Submit(
                request_id=message.request_id,
                attempt=message.attempt,
                sampling=message_of(types_pb2.SamplingParams, message.sampling),
                deadline_s=message.deadline_s,
                prefill_targets=[
                    message_of(decode_pb2.PrefillTarget, target)
                    for target in message.prefill_targets
                ],
            )
            _extend(submit.prompt_token_ids, message.prompt_token_ids)
            return decode_pb2.RouterMessage(submit=submit)
        case m.Cancel():
            return decode_pb2.RouterMessage(cancel=message_of(decode_pb2.Cancel, message))


def router_message_from_proto(message: decode_pb2.RouterMessage) -> m.RouterToDecode:
    match message.WhichOneof("message"):
        case "hello":
            return value_of(m.PeerHello, message.hello, peer_id=message.hello.router_id)
        case "submit":
            submit = message.submit
            return value_of(
                m.Submit,
                submit,
                prompt_token_ids=_tuple_of(submit.prompt_token_ids),
                sampling=sampling_from_proto(submit.sampling),
                prefill_targets=tuple(
                    value_of(m.PrefillTarget, target) for target in submit.prefill_targets
                ),
            )
        case "cancel":
            return value_of(m.Cancel, message.cancel)
        case other:
            raise ValueError(f"unknown router message {other}")


def decode_message_to_proto(message: m.DecodeToRouter) -> decode_pb2.DecodeMessage:
    if isinstance(message, m.PeerHello):
        hello = decode_pb2.DecodeHello(
            worker_id=message.peer_id,
            epoch=message.epoch,
            protocol_version=message.protocol_version,
        )
        return decode_pb2.DecodeMessage(hello=hello)
    outputs = [_output_to_proto(output) for output in message.outputs]
    return decode_pb2.DecodeMessage(outputs=decode_pb2.StepOutputs(outputs=outputs))


def decode_message_from_proto(message: decode_pb2.DecodeMessage) -> m.DecodeToRouter:
    match message.WhichOneof("message"):
        case "hello":
            return value_of(m.PeerHello, message.hello, peer_id=message.hello.worker_id)
        case "outputs":
            return m.StepOutputs(tuple(map(_output_from_proto, message.outputs.outputs)))
        case other:
            raise ValueError(f"unknown decode message {other}")


def _output_to_proto(output: m.RequestOutput) -> decode_pb2.RequestOutput:
    message = decode_pb2.RequestOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        first_index=output.first_index,
        tokens=[token_to_proto(token) for token in output.tokens],
        text=output.text,
    )
    match output.end:
        case Completed() as completed:
            completion = message_of(
                decode_pb2.Completion,
                completed,
                reason=FINISH_TO_PROTO[completed.reason],
                timeline=message_of(types_pb2.PhaseTimeline, completed.timeline),
            )
            message.completed.CopyFrom(completion)
        case Failed() as failed:
            message.failed.CopyFrom(message_of(types_pb2.Failure, failed))
        case None:
            pass
    return message


def _output_from_proto(message: decode_pb2.RequestOutput) -> m.RequestOutput:
    end: Completed | Failed | None = None
    match message.WhichOneof("end"):
        case "completed":
            if message.completed.reason not in FINISH_FROM_PROTO:
                raise ValueError(f"unknown finish reason {message.completed.reason}")
            end = value_of(
                Completed,
                message.completed,
                reason=FINISH_FROM_PROTO[message.completed.reason],
                timeline=value_of(PhaseTimeline, message.completed.timeline),
            )
        case "failed":
            end = failure_from_proto(message.failed)
        case _:
            pass
    return m.RequestOutput(
        request_id=RequestId(message.request_id),
        attempt=message.attempt,
        first_index=message.first_index,
        tokens=tuple(map(token_from_proto, message.tokens)),
        text=message.text,
        end=end,
    )


# Decode worker and prefill worker -----------------------------------------------------------------


def handoff_to_proto(handoff: HandoffId) -> prefill_pb2.HandoffId:
    return prefill_pb2.HandoffId(  # in each message of a handoff, and fast for that
        request_id=handoff.request_id, attempt=handoff.attempt, retry=handoff.retry
    )


def handoff_from_proto(message: prefill_pb2.HandoffId) -> HandoffId:
    return HandoffId(RequestId(message.request_id), message.attempt, message.retry)


def _hello_to_proto(hello: m.HandoffHello) -> prefill_pb2.HandoffHello:
    return message_of(
        prefill_pb2.HandoffHello,
        hello,
        layout=layout_to_proto(hello.layout),
        regions=[message_of(prefill_pb2.RemoteRegion, region) for region in hello.regions],
    )


def _hello_from_proto(message: prefill_pb2.HandoffHello) -> m.HandoffHello:
    layout = layout_from_proto(message)
    most = MAX_NUM_REGIONS_OF_RANK * (layout.num_ranks if layout else 1)
    if len(message.regions) > most:
        raise ValueError(f"a hello may have {most} regions; got {len(message.regions)}")
    regions = tuple(
        value_of(m.RemoteRegion, region, address=dict(region.address)) for region in message.regions
    )
    if layout is not None:
        held = {rank: layout.rank(rank).layout.block_bytes for rank in {r.rank for r in regions}}
        for region in regions:
            if region.block_bytes != held[region.rank]:
                raise ValueError(
                    f"region of rank {region.rank}: a block there has {held[region.rank]} bytes; "
                    f"got {region.block_bytes}"
                )
    return value_of(m.HandoffHello, message, layout=layout, regions=regions)


def to_prefill_proto(message: m.DecodeToPrefill) -> prefill_pb2.DecodeToPrefill:
    envelope = prefill_pb2.DecodeToPrefill
    match message:
        case m.HandoffHello():
            return envelope(hello=_hello_to_proto(message))
        case m.StartHandoff():
            start = prefill_pb2.StartHandoff(
                handoff=handoff_to_proto(message.handoff),
                first_block=message.first_block,
                sampling=message_of(types_pb2.SamplingParams, message.sampling),
                deadline_s=message.deadline_s,
                reads_parts=message.reads_parts,
            )
            _extend(start.prompt_token_ids, message.prompt_token_ids)
            return envelope(start=start)
        case m.BlocksPulled():
            handoff = handoff_to_proto(message.handoff)
            return envelope(pulled=message_of(prefill_pb2.BlocksPulled, message, handoff=handoff))
        case m.RenewLeases():
            handoffs = [handoff_to_proto(handoff) for handoff in message.handoffs]
            return envelope(renew=prefill_pb2.RenewLeases(handoffs=handoffs))
        case m.EndHandoff():
            return envelope(end=prefill_pb2.EndHandoff(handoff=handoff_to_proto(message.handoff)))


def from_decode_proto(message: prefill_pb2.DecodeToPrefill) -> m.DecodeToPrefill:
    match message.WhichOneof("message"):
        case "hello":
            return _hello_from_proto(message.hello)
        case "start":
            return value_of(
                m.StartHandoff,
                message.start,
                handoff=handoff_from_proto(message.start.handoff),
                prompt_token_ids=_tuple_of(message.start.prompt_token_ids),
                sampling=sampling_from_proto(message.start.sampling),
            )
        case "pulled":
            handoff = handoff_from_proto(message.pulled.handoff)
            return value_of(m.BlocksPulled, message.pulled, handoff=handoff)
        case "renew":
            return m.RenewLeases(tuple(map(handoff_from_proto, message.renew.handoffs)))
        case "end":
            return m.EndHandoff(handoff_from_proto(message.end.handoff))
        case other:
            raise ValueError(f"unknown message to prefill {other}")


def to_decode_proto(message: m.PrefillToDecode) -> prefill_pb2.PrefillToDecode:
    envelope = prefill_pb2.PrefillToDecode
    match message:
        case m.HandoffHello():
            return envelope(hello=_hello_to_proto(message))
        case m.HandoffRefused():
            refused = prefill_pb2.HandoffRefused(
                handoff=handoff_to_proto(message.handoff),
                failure=message_of(types_pb2.Failure, message.failure),
            )
            return envelope(refused=refused)
        case m.BlocksForming():
            handoff = handoff_to_proto(message.handoff)
            return envelope(forming=message_of(prefill_pb2.BlocksForming, message, handoff=handoff))
        case m.BlocksOffered():
            handoff = handoff_to_proto(message.handoff)
            return envelope(offered=message_of(prefill_pb2.BlocksOffered, message, handoff=handoff))
        case m.PrefillDone():
            done = message_of(
                prefill_pb2.PrefillDone,
                message,
                handoff=handoff_to_proto(message.handoff),
                first_token=token_to_proto(message.first_token),
            )
            return envelope(done=done)
        case m.HandoffFailed():
            failed = prefill_pb2.HandoffFailed(
                handoff=handoff_to_proto(message.handoff),
                failure=message_of(types_pb2.Failure, message.failure),
            )
            return envelope(failed=failed)


def from_prefill_proto(message: prefill_pb2.PrefillToDecode) -> m.PrefillToDecode:
    match message.WhichOneof("message"):
        case "hello":
            return _hello_from_proto(message.hello)
        case "refused":
            return m.HandoffRefused(
                handoff=handoff_from_proto(message.refused.handoff),
                failure=failure_from_proto(message.refused.failure),
            )
        case "forming":
            return value_of(
                m.BlocksForming,
                message.forming,
                handoff=handoff_from_proto(message.forming.handoff),
                block_ids=tuple(message.forming.block_ids),
            )
        case "offered":
            return value_of(
                m.BlocksOffered,
                message.offered,
                handoff=handoff_from_proto(message.offered.handoff),
                block_ids=tuple(message.offered.block_ids),
                digests=tuple(message.offered.digests),
            )
        case "done":
            return value_of(
                m.PrefillDone,
                message.done,
                handoff=handoff_from_proto(message.done.handoff),
                first_token=token_from_proto(message.done.first_token),
            )
        case "failed":
            return m.HandoffFailed(
                handoff=handoff_from_proto(message.failed.handoff),
                failure=failure_from_proto(message.failed.failure),
            )
        case other:
            raise ValueError(f"unknown message from prefill {other}")
