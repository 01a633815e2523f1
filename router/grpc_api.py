"""The public gRPC service: protobuf to the router's values and back, nothing else."""

from typing import Any

import grpc.aio

from pdserve.domain.errors import PdserveError, Reason
from pdserve.domain.tokens import Finished
from pdserve.rpc.alike import message_of
from pdserve.rpc.codec import FINISH_TO_PROTO, sampling_from_proto, token_to_proto
from pdserve.rpc.errors import abort
from pdserve.rpc.links import AddService, added_by
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc, types_pb2
from router.admission import is_safe_label
from router.dispatch import Dispatcher
from router.requests import Chunk, GenerateCall

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """`pdserve.v1.Inference`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        label = request.request_id or self._dispatcher.draw_label()
        writer = _ChunkWriter(context, label)
        try:
            finished = await self._dispatcher.run(
                _call_from_proto(request, label, context), writer.send
            )
        except PdserveError as error:
            await abort(context, error, _metadata(label, writer.num_tokens))
        else:
            await context.write(writer.last(finished))

    async def Complete(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.CompleteResponse:
        label = request.request_id or self._dispatcher.draw_label()
        # Grows with the answer: made at its end, a long one would hold up all others.
        response = pb.CompleteResponse()
        texts: list[str] = []

        async def collect(chunk: Chunk) -> None:
            response.tokens.extend(map(token_to_proto, chunk.tokens))
            texts.append(chunk.text)

        def take_back() -> None:
            response.Clear()
            texts.clear()

        try:
            finished = await self._dispatcher.run(
                _call_from_proto(request, label, context), collect, take_back=take_back
            )
        except PdserveError as error:
            await abort(context, error, _metadata(label, 0))
            raise
        response.request_id = label
        response.text = "".join(texts)
        response.finished.CopyFrom(_finished_to_proto(finished))
        return response

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        model = self._dispatcher.served_model()
        if model is None:
            return pb.ListModelsResponse()
        listed = pb.Model(
            name=model.name,
            max_context_tokens=model.max_context_tokens,
            vocab_size=model.vocab_size,
        )
        return pb.ListModelsResponse(models=[listed])


def inference_service(dispatcher: Dispatcher) -> AddService:
    """Serve `Inference` with `dispatcher`."""
    add = inference_pb2_grpc.add_InferenceServicer_to_server
    return added_by(add, InferenceService(dispatcher), "pdserve.v1.Inference")


class _ChunkWriter:
    """Writes the chunks of one answer.

    A write that the dispatcher gives up, for a client that does not read, leaves the call able to
    carry its status: gRPC sends it once the client makes room.
    """

    def __init__(self, context: Context, label: str) -> None:
        self.num_tokens = 0
        self._context = context
        self._label = label
        self._is_first = True

    async def send(self, chunk: Chunk) -> None:
        message = pb.GenerateChunk(
            first_index=chunk.first_index,
            tokens=map(token_to_proto, chunk.tokens),
            text=chunk.text,
            request_id=self._take_label(),
        )
        self.num_tokens += len(chunk.tokens)
        try:
            await self._context.write(message)
        except Exception as error:
            if not self._context.cancelled():
                raise
            raise PdserveError("the client is gone", reason=Reason.CANCELLED) from error

    def last(self, finished: Finished) -> pb.GenerateChunk:
        """The message that ends a good answer."""
        return pb.GenerateChunk(
            first_index=self.num_tokens,
            finished=_finished_to_proto(finished),
            request_id=self._take_label(),
        )

    def _take_label(self) -> str:
        label = self._label if self._is_first else ""
        self._is_first = False
        return label


def _call_from_proto(request: pb.GenerateRequest, label: str, context: Context) -> GenerateCall:
    is_tokens = request.WhichOneof("prompt") == "token_ids"
    return GenerateCall(
        prompt=request.token_ids.ids if is_tokens else request.text,
        sampling=sampling_from_proto(request.sampling),
        has_seed=request.sampling.HasField("seed"),
        model=request.model,
        label=label,
        deadline_s=context.time_remaining(),
        slo_class=request.slo_class,
        add_special_tokens=(
            request.add_special_tokens if request.HasField("add_special_tokens") else True
        ),
    )


def _finished_to_proto(finished: Finished) -> pb.Finished:
    return message_of(
        pb.Finished,
        finished,
        reason=FINISH_TO_PROTO[finished.reason],
        usage=message_of(types_pb2.Usage, finished.usage),
        timeline=message_of(types_pb2.PhaseTimeline, finished.timeline),
    )


def _metadata(label: str, num_tokens: int) -> dict[str, str]:
    shown = label if is_safe_label(label) else ""
    return {"request_id": shown, "tokens_delivered": str(num_tokens)}
