"""The attention function that transformers calls for every layer, and what it does with the call.

transformers hands each layer's query, key and value to the function registered under the name in
the model's config. Ours passes them to whatever `attending` has made current in this thread: a
probe while a model is being loaded, the paged cache afterwards. A thread-local and not an argument
of the model, because some models drop arguments that they do not know (StableLM, Nemotron).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from pdserve.domain.invariants import check_invariant

ATTENTION_NAME = "pdserve_paged"
_TEMPERATURE, _CHUNK, _LAYER = "pdserve_temperature", "pdserve_chunk", "pdserve_layer"
"""Attributes of attention modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One layer's attention over the rows of a packed batch; a row attends to itself and before."""

    layer: int  # counted from the first one that this process has
    query: Tensor  # [heads, rows, k_head_dim]
    key: Tensor  # [kv_heads, rows, k_head_dim]
    value: Tensor  # [kv_heads, rows, v_head_dim]
    scaling: float  # factor of query · key
    window: int = 0  # attend to this many positions, the row's own included; 0 is all
    chunk: int = 0  # attend within position // chunk; 0 is everywhere (Llama 4)
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0 leaves them (Gemma 2)
    sinks: Tensor | None = None  # [heads]: a score that takes weight but has no value (gpt-oss)
    temperature: "Temperature | None" = None  # a factor of each query by position (Llama 4)


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries grow with their position p: 1 + scale * log(1 + floor((p + 1) / span))."""

    scale: float
    span: float

    def factors(self, positions: Tensor) -> Tensor:
        """float32, one for each of `positions`."""
        return torch.log1p(torch.floor((positions.float() + 1.0) / self.span)) * self.scale + 1.0


class AttentionTarget(Protocol):
    def attend(self, call: AttentionCall) -> Tensor:
        """Return [rows, heads, v_head_dim]."""
        ...


class ToldLayers:
    """`inner`, telling how many layers from the first on are done. Satisfies `AttentionTarget`."""

    def __init__(self, inner: AttentionTarget, on_layers: Callable[[int], None]) -> None:
        self._inner = inner
        self._on_layers = on_layers
        self._num_done = 0

    def attend(self, call: AttentionCall) -> Tensor:
        result = self._inner.attend(call)
        if call.layer == self._num_done:
            self._num_done += 1
            self._on_layers(self._num_done)
        return result


class _Current(threading.local):
    target: AttentionTarget | None = None


_current = _Current()


@contextmanager
def attending(target: AttentionTarget) -> Iterator[None]:
    """Give all attention calls of this thread to `target`."""
    before, _current.target = _current.target, target
    try:
        yield
    finally:
        _current.target = before


def take_over_temperatures(model: Module) -> None:
    """Have the temperature of Llama 4's layers applied by the target of their attention calls.

    Their own code takes the place among the rows of a call for the position, unless it has the
    library's cache, which would make all beyond `floor_scale` tokens wrong.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "attn_temperature_tuning", None) and not getattr(layer, "use_rope", True):
            temperature = Temperature(float(layer.attn_scale), float(layer.floor_scale))
            setattr(layer, _TEMPERATURE, temperature)
            layer.attn_temperature_tuning = False


def count_layers_from(model: Module, first: int) -> None:
    """Have calls of `model`, which has the layers from `first` on, say their place among these."""
    for module in model.modules():
        layer = vars(module).get("layer_idx")
        if isinstance(layer, int):
            setattr(module, _LAYER, layer - first)


def register_attention() -> None:
    """Make the function known to transformers; harmless when repeated.

    Registered as attention only, not as a mask function, so transformers builds no mask: causality
    and windows are the target's business.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _paged_attention)


def _paged_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Signature of `AttentionInterface`; query, key, value: [1, heads, rows, head_dim]."""
    check_invariant(attention_mask is None, "transformers builds no mask, which would be ignored")
    layer: Any = vars(module).get(_LAYER, module.layer_idx)
    call = AttentionCall(
        layer=layer,
        query=query[0],
        key=key[0],
        value=value[0],
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=int(sliding_window or 0),
        chunk=_chunk(module),
        softcap=float(softcap or 0),
        sinks=s_aux,
        temperature=vars(module).get(_TEMPERATURE),
    )
    return attend(call).unsqueeze(0), None


def attend(call: AttentionCall) -> Tensor:
    """What the target that `attending` has made current answers: [rows, heads, v_head_dim].

    Compiled code has it as one operator, which finds the target of each pass when it runs.
    """
    if torch.compiler.is_compiling():
        temperature = call.temperature
        found: Tensor = torch.ops.pdserve.attend(
            call.query,
            call.key,
            call.value,
            call.sinks,
            call.layer,
            call.scaling,
            call.window,
            call.chunk,
            call.softcap,
            None if temperature is None else [temperature.scale, temperature.span],
        )
        return found
    target = _current.target
    assert target is not None, "a model with paged attention runs only inside `attending`"
    return target.attend(call)


torch.library.define(
    "pdserve::attend",
    "(Tensor query, Tensor key, Tensor value, Tensor? sinks, int layer, float scaling, int window, "
    "int chunk, float softcap, float[]? temperature) -> Tensor",
)


@torch.library.impl("pdserve::attend", "CompositeExplicitAutograd")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layer: int,
    scaling: float,
    window: int,
    chunk: int,
    softcap: float,
    temperature: list[float] | None,
) -> Tensor:
    call = AttentionCall(
        layer=layer,
        query=query,
        key=key,
        value=value,
        scaling=scaling,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=sinks,
        temperature=None if temperature is None else Temperature(*temperature),
    )
    return attend(call).contiguous()  # as `_shape_alone` says


def _shape_alone(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[2])


torch.library.register_fake("pdserve::attend", _shape_alone)


def _chunk(module: Module) -> int:
    """Chunked attention is said only by the mask, which is not built, and by the config.

    Remembered, because configs of the library are slow to read.
    """
    remembered: int | None = vars(module).get(_CHUNK)
    if remembered is None:
        layer: Any = module
        config: Any = getattr(layer, "config", None)
        kinds: Any = getattr(config, "layer_types", None)
        is_chunked = bool(kinds) and kinds[layer.layer_idx] == "chunked_attention"
        remembered = int(config.attention_chunk_size) if is_chunked else 0
        setattr(module, _CHUNK, remembered)
    return remembered


def visible(call: AttentionCall, queries: Tensor, keys: Tensor) -> Tensor:
    """Which key positions each query position sees: bool [queries, keys]."""
    rows, columns = queries[:, None], keys[None, :]
    mask = columns <= rows
    if call.window:
        mask &= columns > rows - call.window
    if call.chunk:
        mask &= columns // call.chunk == rows // call.chunk
    return mask


def first_visible(call: AttentionCall, position: int) -> int:
    """The first position that the row at `position` sees."""
    first = max(0, position - call.window + 1) if call.window else 0
    return max(first, position - position % call.chunk) if call.chunk else first


def attend_dense(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, start: int, first: int
) -> Tensor:
    """Attention of one sequence's rows, at positions `start`, ... over keys at `first`, ...

    query: [heads, rows, k_head_dim]; key, value: [kv_heads, keys, head_dim]; returns
    [heads, rows, v_head_dim].
    """
    groups = query.shape[0] // key.shape[0]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=0) for part in (key, value))
    num_rows, num_keys = query.shape[1], key.shape[1]
    last_sees_all = first >= first_visible(call, start + num_rows - 1)
    is_causal = num_rows > 1 and start == first and last_sees_all
    mask = None
    if num_rows > 1 and not is_causal:
        queries = torch.arange(start, start + num_rows, device=query.device)
        mask = visible(call, queries, torch.arange(first, first + num_keys, device=query.device))
    if not call.softcap and call.sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], mask, is_causal=is_causal, scale=call.scaling
        )[0]
    if is_causal:
        mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).tril()
    return _attend_explicitly(call, query, key, value, mask)


def _attend_explicitly(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    scores = torch.matmul(query, key.transpose(1, 2)).float() * call.scaling
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.float().reshape(-1, 1, 1).expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[1]]
    return torch.matmul(weights.to(value.dtype), value)


class DenseAttention:
    """Attends over the rows of one request, which are at positions 0, 1, ..., without a cache."""

    def attend(self, call: AttentionCall) -> Tensor:
        query = call.query
        if call.temperature is not None:
            positions = torch.arange(query.shape[1], device=query.device)
            query = query * call.temperature.factors(positions).to(query.dtype)[:, None]
        return attend_dense(call, query, call.key, call.value, 0, 0).transpose(0, 1)
