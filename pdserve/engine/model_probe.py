"""Finds out, by running it, whether a model can be served and what its KV cache looks like.

A flag in a model's class does not tell: some models that say no work, and some compute attention on
their own without a word (then their tokens would be silently wrong). So a loaded model is run on a
few tokens, and must call our attention once for every layer, and give the logits it gives without
us.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.attention import (
    ATTENTION_NAME,
    AttentionCall,
    attending,
    register_attention,
    take_over_temperatures,
)
from pdserve.engine.model_shape import UNSUPPORTED, item_bytes

_NUM_PROBE_TOKENS, _MIN_PROBE_TOKENS = 24, 8
_TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.2}


class _Recorder:
    """Answers attention calls with zeros and remembers their shapes."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.layers: dict[int, LayerKv] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        self.calls[call.layer] += 1
        num_kv_heads, rows, k_head_dim = call.key.shape
        self.layers[call.layer] = LayerKv(num_kv_heads, k_head_dim, call.value.shape[-1])
        return call.query.new_zeros(rows, call.query.shape[0], call.value.shape[-1])


def run_packed(model: Any, token_ids: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
    """One packed forward without the library's own cache; logits [rows, vocabulary]."""
    output = model(
        input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **kwargs
    )
    logits: Tensor = output.logits[0]
    return logits


def run_probe(model: Any, token_ids: Tensor, positions: Tensor) -> Tensor:
    """`run_packed` wherever the model lies, of tensors of the host; its logits come to the host."""
    device = model.device
    return run_packed(model, token_ids.to(device), positions.to(device)).cpu()


@torch.inference_mode()
def plain_logits(model: Any, token_ids: Tensor, length: int) -> Tensor:
    """Logits of a forward with the attention the model came with; call before `use_paged`.

    They are those of the first tokens of a request of `length`: beside them its last is computed.
    """
    num_rows = len(token_ids)
    positions = torch.arange(num_rows)
    if length > num_rows:
        positions = torch.cat([positions, torch.tensor([length - 1])])
        token_ids = torch.cat([token_ids, token_ids[:1]])
    try:
        return run_probe(model, token_ids, positions)[:num_rows]
    except Exception as error:  # any model code may run here
        raise refusal(model, f"it does not compute a token at position {length - 1}") from error


def probe_tokens(vocab_size: int, switches: Sequence[int] = ()) -> Tensor:
    """A few tokens, shorter than the first of `switches` that leaves enough to tell anything."""
    generator = torch.Generator().manual_seed(0)
    usable = [switch for switch in switches if switch >= _MIN_PROBE_TOKENS]
    num_tokens = min([_NUM_PROBE_TOKENS, *usable])
    return torch.randint(0, vocab_size, (num_tokens,), generator=generator)


def use_paged(model: Any) -> None:
    """Make `model` call our attention; what it calls really is for `discover_layout` to see."""
    register_attention()
    take_over_temperatures(model)
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except Exception as error:  # the library's reasons are many, and are all this one
        raise refusal(model, "it does not accept another attention function") from error


@torch.inference_mode()
def discover_layout(
    model: Any, *, block_size: int, dtype: str, num_layers: int | None = None
) -> KvLayout:
    """Run a few tokens; `LocalFault` unless every layer calls our attention exactly once.

    A rank of many has `num_layers` of the model's.
    """
    config = model.config.get_text_config()
    num_layers = num_layers or int(config.num_hidden_layers)
    tokens = probe_tokens(config.vocab_size)
    recorder = _Recorder()
    try:
        with attending(recorder):
            run_probe(model, tokens, torch.arange(len(tokens)))
    except Exception as error:  # any model code may run here
        raise refusal(model, "its forward does not take packed tokens") from error
    missing = [layer for layer in range(num_layers) if recorder.calls[layer] == 0]
    if missing:
        raise refusal(
            model, f"{len(missing)} of its {num_layers} layers never call the attention interface"
        )
    if set(recorder.calls) != set(range(num_layers)) or set(recorder.calls.values()) != {1}:
        raise refusal(model, "some of its layers call the attention interface more than once")
    return KvLayout(
        layers=tuple(recorder.layers[layer] for layer in range(num_layers)),
        block_size=block_size,
        dtype=dtype,
        item_bytes=item_bytes(dtype),
    )


def check_same_logits(model: Any, paged: Tensor, plain: Tensor, dtype: str) -> None:
    """`LocalFault` if paged attention changed what the model computes; [rows, vocabulary] each."""
    ruled_out = plain == -torch.inf
    if bool(plain.isnan().any()) or bool((plain == torch.inf).any()):
        raise refusal(model, f"its logits are NaN or infinite in {dtype}; try another dtype")
    if torch.equal(ruled_out, paged == -torch.inf):
        plain, paged = plain.masked_fill(ruled_out, 0), paged.masked_fill(ruled_out, 0)
    difference = torch.linalg.vector_norm(paged.float() - plain.float())
    norm = torch.linalg.vector_norm(plain.float() - plain.float().mean(dim=-1, keepdim=True))
    if not difference <= _TOLERANCE[dtype] * norm + 1e-6:
        raise refusal(model, "with paged attention it computes other logits than without")


def probe_table(num_tokens: int, block_size: int, place: int = 0) -> tuple[BlockId, ...]:
    """Blocks in falling order, so that a model that ignores the table is found out.

    Tables of different `place` share none.
    """
    num_blocks = -(-num_tokens // block_size)
    first = place * num_blocks
    return tuple(BlockId(block) for block in range(first + num_blocks - 1, first - 1, -1))


def refusal(model: Any, reason: str) -> LocalFault:
    """The error for a loaded model that cannot be served; `reason` is a clause about "it"."""
    kind = model.config.model_type
    known = UNSUPPORTED.get(kind)
    return LocalFault(
        f"model type {kind} cannot be served: {reason}" + (f" ({known})" if known else "")
    )
