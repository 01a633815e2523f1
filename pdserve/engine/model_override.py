"""A model's config.json with what a person put in its place; no torch."""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pdserve.config.override import ModelOverride, is_by_layer_type
from pdserve.domain.errors import LocalFault
from pdserve.engine.model_shape import CONTEXT_KEYS, first_int, text_config

_KEPT = ("rope_theta", "partial_rotary_factor")  # of the model, unless they are given
_STRETCHED_FROM_ORIGINAL = ("yarn", "llama3", "longrope")
_STRETCHED = ("linear", "proportional")


def with_override(config: Mapping[str, Any], override: ModelOverride) -> Mapping[str, Any]:
    """`config` as the model is told it; raises `LocalFault` for what its positions cannot do."""
    changed = copy.deepcopy(dict(config))
    part = text_config(changed)
    assert isinstance(part, dict)
    if override.rope_parameters is not None:
        _put_rope(part, override.rope_parameters)
    if override.max_position_embeddings is not None:
        if "max_position_embeddings" not in part:
            raise _fault(
                "max_position_embeddings",
                "this model learned its positions one by one: max_context_tokens can shorten them",
            )
        _check_limit("max_position_embeddings", override.max_position_embeddings, config, changed)
        part["max_position_embeddings"] = override.max_position_embeddings
    return changed


def max_context_tokens(
    config: Mapping[str, Any], override: ModelOverride, *, original: Mapping[str, Any]
) -> int | None:
    """Of one request with `config`, which came of `original`; None where it gives no limit."""
    if override.max_context_tokens is not None:
        _check_limit("max_context_tokens", override.max_context_tokens, original, config)
        return override.max_context_tokens
    return first_int(text_config(config), *CONTEXT_KEYS)


def override_bytes(override: ModelOverride) -> bytes:
    """What tells models with different overrides apart; empty for none."""
    given = override.model_dump(exclude_none=True)
    return json.dumps(given, sort_keys=True).encode() if given else b""


def _put_rope(part: dict[str, Any], given: Mapping[str, Any]) -> None:
    """In the form that the config has; old configs keep one set, called rope_scaling."""
    old = part.get("rope_parameters")
    has_layer_types = isinstance(old, dict) and is_by_layer_type(old)
    if is_by_layer_type(given):
        kinds = set(old or {}) if has_layer_types else set(part.get("layer_types") or ())
        if unknown := sorted(set(given) - kinds):
            known = ", ".join(sorted(kinds)) or "none"
            raise _fault("rope_parameters", f"no layer type {unknown[0]} here; there are: {known}")
        kept = old if has_layer_types and old is not None else {}
        part["rope_parameters"] = {
            **kept,
            **{kind: _merged(kept.get(kind) or {}, rope) for kind, rope in given.items()},
        }
        return
    if has_layer_types and old is not None:
        raise _fault(
            "rope_parameters",
            f"is by layer type in this model: give it for {', '.join(sorted(old))}",
        )
    name = "rope_parameters" if "rope_parameters" in part else "rope_scaling"
    part[name] = _merged(old or part.get("rope_scaling") or {}, given)
    if (original := given.get("original_max_position_embeddings")) is not None:
        part["original_max_position_embeddings"] = original  # Phi-3 looks for it here first


def _merged(old: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: old[name] for name in _KEPT if name in old}, **given}


def _check_limit(
    field: str, value: int, original: Mapping[str, Any], changed: Mapping[str, Any]
) -> None:
    """`value` is at most what the model was made for, or what rope scaling stretches that to."""
    made_for = first_int(text_config(original), *CONTEXT_KEYS)
    if made_for is None:
        return
    limit = max([made_for, *_stretched(original, changed, made_for)])
    if value > limit:
        raise _fault(
            field,
            f"must be at most {limit}: the model is made for {made_for} tokens, which "
            "rope_parameters of type yarn, linear, llama3, longrope or proportional stretch by "
            f"their factor; got {value}",
        )


def _stretched(
    original: Mapping[str, Any], changed: Mapping[str, Any], made_for: int
) -> Iterator[int]:
    before = list(_ropes(text_config(original)))
    for rope in _ropes(text_config(changed)):
        kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
        if not isinstance(factor, int | float):
            continue
        trained = rope.get("original_max_position_embeddings")
        if kind in _STRETCHED_FROM_ORIGINAL and isinstance(trained, int):
            yield int(trained * factor)
        elif kind in _STRETCHED and rope not in before:  # else made_for counts it already
            yield int(made_for * factor)


def _ropes(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name in ("rope_parameters", "rope_scaling"):
        rope = part.get(name)
        if isinstance(rope, Mapping):
            yield from rope.values() if is_by_layer_type(rope) else (rope,)


def _fault(field: str, rule: str) -> LocalFault:
    return LocalFault(f"override_config.{field}: {rule}")
