"""The numbers in a model's files, checked before they reach any arithmetic; no torch.

A size of 0, a rope base that is not a number or an end token beyond the vocabulary would show only
in some request's step. `null` stands for the default of the model's type, and passes.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pdserve.domain.errors import LocalFault

_SIZES = (
    *("vocab_size", "max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"),
    *("num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "n_head", "num_heads"),
    *("num_key_value_heads", "num_kv_heads", "head_dim", "hidden_size", "n_embd", "d_model"),
    *("intermediate_size", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"),
    *("original_max_position_embeddings", "attention_chunk_size"),
)
_POSITIVE = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    *("rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"),
    *("partial_rotary_factor", "query_pre_attn_scalar", "logits_scaling"),
)
_FINITE = (
    *("logit_scale", "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    *("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"),
)
_ROPE = ("rope_scaling", "rope_parameters")
_ROPE_POSITIVE = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "short_factor", "long_factor", "partial_rotary_factor"),
    *("short_mscale", "long_mscale", "original_max_position_embeddings"),
)
_ROPE_FINITE = ("mscale", "mscale_all_dim")

Test = Callable[[Any], bool]


def check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Raise `LocalFault` with file, field, limit and value of the first number that is unfit.

    `config` is the part of `path` that describes the language model.
    """
    _check(config, _SIZES, "must be a whole number above 0", _is_size, path)
    _check(config, _POSITIVE, "must be a finite number above 0", _is_positive, path)
    _check(config, _FINITE, "must be a finite number", _is_finite, path)
    for name in _ROPE:
        rope = config.get(name)
        if isinstance(rope, dict):
            _check_rope(rope, name, path)


def _check_rope(rope: Mapping[str, Any], name: str, path: Path) -> None:
    """One set of numbers, or one for each kind of layer."""
    _check(rope, _ROPE_POSITIVE, "must be a finite number above 0", _is_positive, path, name)
    _check(rope, _ROPE_FINITE, "must be a finite number", _is_finite, path, name)
    for kind, part in rope.items():
        if isinstance(part, dict):
            _check_rope(part, f"{name}.{kind}", path)


def _check(
    config: Mapping[str, Any],
    fields: tuple[str, ...],
    rule: str,
    is_fit: Test,
    path: Path,
    inside: str = "",
) -> None:
    for field in fields:
        value = config.get(field)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and not is_fit(each):
                name = f"{inside}.{field}" if inside else field
                raise LocalFault(f"{path}: {name} {rule}; got {each!r}")


def end_token_ids(value: Any, *, vocab_size: int, field: str, path: Path) -> tuple[int, ...]:
    """One id or a list of them, as model files name them; `LocalFault` for one that is no token."""
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    for each in listed:
        if not _is_whole(each) or not 0 <= each < vocab_size:
            raise LocalFault(
                f"{path}: {field} must be a token id from 0 to {vocab_size - 1}; got {each!r}"
            )
    return tuple(dict.fromkeys(listed))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and 0 < value < 2**31


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < math.inf


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0
