"""A small random model of the same kind as a large one, to try a division on."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from pdserve.engine.sharding.building import build_random
from pdserve.engine.sharding.local_config import BY_LAYER, DIVIDED, KV_HEADS, real_names

_VOCAB_SIZE = 97  # divides by few numbers of ranks
_LEAST_WIDTH, _INNER_SIZE, _RANK = 64, 16, 16
_MAX_NUM_LAYERS = 12
_HEADS = "num_attention_heads"
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def twin_config(config: Any, *, tp: int, pp: int) -> Any:
    """A copy of `config` with small sizes, that divides into `tp` and `pp` parts as `config` does.

    Head sizes, how KV heads go into ranks, experts, kinds of layers and positions stay; widths, the
    number of layers and the vocabulary shrink.
    """
    twin = copy.deepcopy(config)
    sizes = twin.get_text_config()
    values = sizes.to_dict()
    small = _small_values(values, real_names(sizes), tp=tp, pp=pp)
    made = type(sizes).from_dict({**values, **small})
    if sizes is twin:
        return made
    twin.text_config = made
    return twin


def random_twin(config: Any, seed: int) -> Any:
    """A model of `config` whose every weight matters, its attention's too.

    With the library's small weights a head attends to all tokens alike, and heads that were mixed
    up would not show.
    """
    model = build_random(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            is_table = isinstance(module, torch.nn.Embedding)
            for tensor in module.parameters(recurse=False):
                noise = torch.randn(tensor.shape, generator=generator)
                if tensor.dim() < 2:
                    tensor.copy_(tensor.mean().round() + 0.2 * noise)
                else:
                    fan_in = tensor.shape[0 if type(module).__name__ == "Conv1D" else -1]
                    tensor.copy_(noise if is_table else noise * fan_in**-0.5)
    return model


def _small_values(
    values: Mapping[str, Any], name_of: Mapping[str, str], *, tp: int, pp: int
) -> dict[str, Any]:
    heads_name, width_name = name_of[_HEADS], name_of["hidden_size"]
    layers_name, vocab_name = name_of["num_hidden_layers"], name_of["vocab_size"]
    heads = values[heads_name]
    kv_heads = values.get("num_key_value_heads") or heads
    few, few_kv = _few_heads(heads, kv_heads, tp)
    head_dim = values.get("head_dim")
    own_dim = values[width_name] // heads
    width = few * -(-_LEAST_WIDTH // few)
    small: dict[str, Any] = {}
    if tp == 1 and head_dim in (None, own_dim):
        width = few * own_dim  # which the code of some kinds takes for granted
    elif head_dim is None and "qk_nope_head_dim" not in values:
        small["head_dim"] = own_dim  # as for a shard
    small |= {
        heads_name: few,
        width_name: width,
        vocab_name: _VOCAB_SIZE,
        **{name: None for name in _TOKENS if name in values},
        **{name: _VOCAB_SIZE for name in ("vocab_size_per_layer_input",) if name in values},
    }
    for name in KV_HEADS:
        if isinstance(value := values.get(name), int):
            small[name] = few_kv if value == kv_heads else _few_heads(heads, value, tp)[1]
    for name in dict.fromkeys(name_of[each] for each in DIVIDED):
        if name != heads_name and (inner := _small_inner(values.get(name), tp)) is not None:
            small[name] = inner
    for name in ("kv_lora_rank", "q_lora_rank"):
        if isinstance(value := values.get(name), int):
            small[name] = min(value, _RANK)
    if values.get("word_embed_proj_dim") == values[width_name]:
        small["word_embed_proj_dim"] = width
    num_layers = values[layers_name]
    few_layers = _few_layers(values, num_layers, pp)
    small[layers_name] = few_layers
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == num_layers:
            small[name] = value[:few_layers]
    if isinstance(first := values.get("first_k_dense_replace"), int):
        small["first_k_dense_replace"] = min(first, 1)
    if by_layer := values.get(BY_LAYER):
        small[BY_LAYER] = _small_layers(by_layer, few_layers, heads, tp)
    return small


def _few_heads(heads: int, kv_heads: int, tp: int) -> tuple[int, int]:
    """Query and KV heads, two a rank if there are so many, KV heads shared alike."""
    few_kv = min(kv_heads, 2 * tp) if kv_heads >= tp else kv_heads
    if kv_heads % tp == 0 and few_kv % tp:
        few_kv = tp
    few = few_kv if heads == kv_heads else max(2 * few_kv, 2 * tp)
    return (heads, kv_heads) if few >= heads or heads % tp else (few, few_kv)


def _small_inner(value: Any, tp: int) -> Any:
    """One size, or one for each layer; None stays what the class makes of it."""
    if isinstance(value, list | tuple):
        return [_small_inner(each, tp) for each in value]
    is_size = isinstance(value, int) and not isinstance(value, bool)
    return _INNER_SIZE * tp if is_size else None


def _few_layers(values: Mapping[str, Any], num_layers: int, pp: int) -> int:
    """As many of the first layers as have one of every kind among them, and one for each stage."""
    kinds = [
        value
        for value in values.values()
        if isinstance(value, list | tuple) and len(value) == num_layers
    ]
    fewest = 2
    for value in kinds:
        listed = [str(each) for each in value]
        if len(set(listed)) <= _MAX_NUM_LAYERS:
            fewest = max(fewest, *(listed.index(each) + 1 for each in set(listed)))
    for name in ("decoder_sparse_step", "interleave_moe_layer_step"):
        if isinstance(step := values.get(name), int):
            fewest = max(fewest, step)
    return min(num_layers, max(pp, min(fewest, _MAX_NUM_LAYERS)))


def _small_layers(
    by_layer: Mapping[Any, Mapping[str, Any]], num_layers: int, heads: int, tp: int
) -> dict[Any, dict[str, Any]]:
    """What some layers have of their own."""
    return {
        layer: {
            name: _few_heads(heads, value, tp)[1] if name in KV_HEADS else value
            for name, value in own.items()
        }
        for layer, own in by_layer.items()
        if int(layer) < num_layers
    }
