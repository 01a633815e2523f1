"""The public service, seen from a client."""

from collections.abc import AsyncGenerator
from typing import Self

import grpc

from pdserve.client import codec
from pdserve.client.channel import open_channel
from pdserve.client.errors import error_from_call
from pdserve.client.values import Answer, Chunk, Model, Prompt, Sampling
from pdserve.domain.errors import PdserveError
from pdserve.rpc.alike import value_of
from pdserve.v1 import inference_pb2, inference_pb2_grpc

DEFAULT_SAMPLING = Sampling()


class InferenceClient:
    """Talks to one router over one connection. All methods raise `PdserveError` and nothing else.

    Safe to use from many tasks of one event loop. Close it, or use it as a context manager.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = open_channel(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls that still run and close the connection."""
        await self._channel.close(grace=None)

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        model: str = "",
        request_id: str = "",
        slo_class: str = "",
        timeout_s: float | None = None,
        add_special_tokens: bool | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer; the last chunk has `finished`.

        `timeout_s` is the request's deadline, from now to the last token. Leaving the loop early
        cancels the request once the generator is closed (`contextlib.aclosing`). `slo_class` is one
        of the router's; empty: its first. `add_special_tokens` False puts no begin token before a
        text that holds all its own, as a chat template writes it.
        """
        message = codec.request_to_proto(
            prompt,
            sampling,
            model=model,
            request_id=request_id,
            slo_class=slo_class,
            add_special_tokens=add_special_tokens,
        )
        call = self._stub.Generate(message, timeout=timeout_s)
        num_tokens, is_finished = 0, False
        try:
            async for response in call:
                chunk = codec.chunk_from_proto(response)
                if chunk.first_index != num_tokens:
                    raise PdserveError(f"token {num_tokens} missing from the answer")
                num_tokens += len(chunk.tokens)
                is_finished = chunk.finished is not None
                yield chunk
            if not is_finished:
                raise PdserveError("the answer stopped without its end")
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from None
        finally:
            call.cancel()  # does nothing to a call that ended

    async def complete(
        self,
        prompt: Prompt,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        model: str = "",
        request_id: str = "",
        slo_class: str = "",
        timeout_s: float | None = None,
        add_special_tokens: bool | None = None,
    ) -> Answer:
        """The whole answer at once; cancelling the task cancels the request."""
        message = codec.request_to_proto(
            prompt,
            sampling,
            model=model,
            request_id=request_id,
            slo_class=slo_class,
            add_special_tokens=add_special_tokens,
        )
        try:
            return codec.answer_from_proto(await self._stub.Complete(message, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from None

    async def list_models(self, *, timeout_s: float | None = 10.0) -> tuple[Model, ...]:
        request = inference_pb2.ListModelsRequest()
        try:
            response = await self._stub.ListModels(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self.address) from None
        return tuple(value_of(Model, model) for model in response.models)
