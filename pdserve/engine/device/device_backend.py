"""A model on a device: how it is brought there, and what `PagedModel` needs there."""

from collections.abc import Sequence
from typing import Any

import structlog
import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.layout import BlockOrder, KvLayout
from pdserve.engine.attention import AttentionCall, attending
from pdserve.engine.backend import BatchAttention, DenseAttention
from pdserve.engine.contract import StepLimits
from pdserve.engine.device.compiled_body import Codes, compile_body
from pdserve.engine.device.device_attention import DeviceAttention
from pdserve.engine.device.device_kv import DeviceKv
from pdserve.engine.device.joined_weights import join_linears
from pdserve.engine.device.op import AUTO, TORCH, TRITON, triton_obstacle
from pdserve.engine.device.request import AttentionRequest
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.device.staging import Stager
from pdserve.engine.device.token_feed import TokenFeed
from pdserve.engine.device.variants import AttentionKind, chunk_rows_per_tile
from pdserve.engine.kv_store import KvStore
from pdserve.engine.model_probe import run_probe
from pdserve.engine.paged_cache import PagedCache

DENSE = "dense"
KERNELS = (AUTO, TRITON, TORCH, DENSE)

log = structlog.get_logger(__name__)


def bring_to(model: Any, runtime: DeviceRuntime) -> Any:
    """Move the weights; the model's forward reads nothing back from the device afterwards.

    `LocalFault` if they do not fit, with what would.
    """
    needed, free = weight_bytes(model), runtime.free_bytes()
    if needed > free:
        raise LocalFault(_too_large(model, runtime, needed, free))
    try:
        moved = model.to(runtime.device)
    except torch.OutOfMemoryError as error:
        raise LocalFault(_too_large(model, runtime, needed, free)) from error
    for module in moved.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            # It looks for padding among the tokens of every step. There is none.
            module.warn_if_padding_and_no_attention_mask = lambda *args: None
    return moved


def weight_bytes(model: Any) -> int:
    """Of all weights and buffers, each once."""
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def _too_large(model: Any, runtime: DeviceRuntime, needed: int, free: int) -> str:
    advice = "give the worker more ranks (tp, pp), each with a GPU of its own"
    if any(each.dtype is torch.float32 for each in model.parameters()):
        half = "fits" if needed // 2 <= free else "would not fit either"
        advice = f"dtype bfloat16 takes half of it and {half}; or {advice}"
    return (
        f"the model's weights take {gib(needed)} and {runtime.device} has {gib(free)} free of "
        f"{gib(runtime.total_bytes())}: {advice}"
    )


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


class DeviceBackend:
    """Satisfies `ModelBackend` on a device."""

    def __init__(
        self,
        runtime: DeviceRuntime,
        attention: str = AUTO,
        order: BlockOrder = BlockOrder.TOKENS,
        *,
        max_num_requests: int = StepLimits().max_num_requests,
        compiler: str | None = None,
    ) -> None:
        """`attention`: `triton`, `torch` (one operator either way), `dense` (request by request,
        as on the host), or `auto`: Triton where it can be used, else torch. A step draws for
        `max_num_requests` at most if another one follows it. `compiler`: of `torch.compile`, for
        the model's layers; None leaves them as they are.
        """
        if attention not in KERNELS:
            known = ", ".join(KERNELS)
            raise LocalFault(f"attention on {runtime.device} must be one of {known}: {attention}")
        obstacle = triton_obstacle(runtime.device.type)
        if obstacle and attention == AUTO:
            log.warning("attention.without_kernels", device=str(runtime.device), reason=obstacle)
        self.runtime = runtime
        self.order = order
        self.stager = Stager(runtime)
        self.feed = TokenFeed(runtime, max_num_requests)
        self.codes: Codes | None = None
        self._compiler = compiler
        self._kernels = attention
        self._uses_triton = attention == TRITON or (attention == AUTO and not obstacle)
        self._calls: Sequence[AttentionCall] = ()

    def prepare(self, model: Any) -> None:
        """Join what can be one product, and find out what its layers ask of attention."""
        join_linears(model)
        self.runtime.trim()  # of what was joined the parts are free
        recorder = _Recorder()
        with attending(recorder), torch.inference_mode():
            run_probe(model, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        self._calls = recorder.calls
        if self._compiler:
            self.codes = compile_body(model, self._compiler)

    def open_kv(self, layout: KvLayout, num_blocks: int) -> DeviceKv:
        return DeviceKv(layout, num_blocks, self.runtime)

    def attention(self, kv: KvStore) -> BatchAttention:
        """All kernels that its steps can launch are compiled when this returns."""
        cache = PagedCache(kv)
        if self._kernels == DENSE:
            return DenseAttention(cache, self.runtime.device)
        requests = [_request(call, cache) for call in self._calls]
        kinds: list[AttentionKind] = [request.kind() for request in requests]
        rows_per_tile = chunk_rows_per_tile(kinds)
        if self._uses_triton and self.runtime.device.type == "cuda":  # elsewhere it interprets
            from pdserve.engine.device.triton_attention import warm  # imports triton

            warm(requests, rows_per_tile=(1, rows_per_tile))
        return DeviceAttention(
            cache,
            self.runtime,
            self.stager,
            kernels=self._kernels,
            chunk_rows_per_tile=rows_per_tile,
            feed=self.feed,
        )

    def close(self) -> None:
        self.stager.close()


class _Recorder:
    """Answers attention calls with zeros and keeps them."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        return call.query.new_zeros(call.query.shape[1], call.query.shape[0], call.value.shape[-1])


def _request(call: AttentionCall, cache: PagedCache) -> AttentionRequest:
    query, key, value = (part.transpose(0, 1) for part in (call.query, call.key, call.value))
    return AttentionRequest(
        query=query,
        key=key,
        value=value,
        k_cache=cache.keys[call.layer],
        v_cache=cache.values[call.layer],
        scaling=call.scaling,
        window=call.window,
        chunk=call.chunk,
        softcap=call.softcap,
        sinks=call.sinks,
    )
