"""The config of one shard of a model: the library's own code then makes modules of its sizes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from pdserve.domain.errors import LocalFault

DIVIDED = (
    *("num_attention_heads", "intermediate_size", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"),
    *("moe_shared_expert_intermediate_size", "dense_intermediate_size", "expert_ffn_hidden_size"),
    *("ffn_dim", "ffn_hidden_size", "mlp_hidden_size", "n_inner"),
)
KV_HEADS = ("num_key_value_heads", "num_global_key_value_heads")
BY_LAYER = "per_layer_config"


def local_config(config: Any, tp: int) -> Any:
    """A copy of `config` whose heads and inner sizes are those of one of `tp` shards.

    KV heads are divided too, or stay one a shard if they are fewer. `LocalFault` names the size
    that does not divide.
    """
    local = copy.deepcopy(config)
    if tp == 1:
        return local
    sizes = local.get_text_config()
    if getattr(sizes, "is_heterogeneous", False):
        if sizes is not local:
            raise unfit(config, tp, "the sizes of its layers differ, and it is part of another")
        return _by_layer(config, tp)
    if getattr(sizes, "head_dim", None) is None and not hasattr(sizes, "qk_nope_head_dim"):
        sizes.head_dim = sizes.hidden_size // sizes.num_attention_heads
    name_of = real_names(sizes)
    for name in dict.fromkeys(name_of[name] for name in (*KV_HEADS, *DIVIDED)):
        value = getattr(sizes, name, None)
        if (divided := _divided(config, name, value, tp)) is not None:
            setattr(sizes, name, divided)
    return local


def _by_layer(config: Any, tp: int) -> Any:
    """Of a config that gives some layers other sizes than the rest."""
    values = config.to_dict()
    for sizes in (values, *values[BY_LAYER].values()):
        for name in (*KV_HEADS, *DIVIDED):
            if (divided := _divided(config, name, sizes.get(name), tp)) is not None:
                sizes[name] = divided
    build: Callable[[dict[str, Any]], Any] = type(config).from_dict
    return build(values)


def _divided(config: Any, name: str, value: Any, tp: int) -> int | list[int] | None:
    """None if there is nothing to divide."""
    if isinstance(value, list | tuple):
        parts = [_divided(config, name, each, tp) for each in value]
        return None if None in parts else [part for part in parts if isinstance(part, int)]
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if name in KV_HEADS:
        if value % tp and tp % value:
            raise unfit(config, tp, f"its {value} KV heads divide neither by it nor into it")
        return max(1, value // tp)
    if value % tp:
        raise unfit(config, tp, f"its {name} {value} does not divide by it")
    return value // tp


class _Names(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


def real_names(sizes: Any) -> Mapping[str, str]:
    """By the library's common names, those that a config has in their place."""
    return _Names(getattr(sizes, "attribute_map", None) or {})


def unfit(config: Any, tp: int, reason: str, *, pp: int = 1) -> LocalFault:
    """The error for a model that cannot be divided so; `reason` is a clause."""
    num_layers = config.get_text_config().num_hidden_layers
    how, instead = f"pp {pp}", "serve it on one rank"
    if tp > 1:
        how = f"tp {tp}"
        instead = f"give ranks whole layers (tp 1, pp up to {num_layers}), or {instead}"
    kind = config.model_type
    return LocalFault(f"model type {kind} cannot be served with {how}: {reason}; {instead}")
