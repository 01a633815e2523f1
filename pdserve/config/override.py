"""What a person may put in place of what a model's config.json says, checked field by field."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeGuard

from pydantic import AfterValidator, AliasChoices, Field

from pdserve.config.base import Settings

MAX_CONTEXT = 2**31 - 1
MAX_NUM_FACTORS = 1024
MAX_NUMBER = 1e30

Check = Callable[[object], bool]


def _number(value: object) -> TypeGuard[int | float]:
    """Not NaN and not infinite either."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -MAX_NUMBER < value < MAX_NUMBER


def _positive(value: object) -> bool:
    return _number(value) and value > 0


def _length(value: object) -> bool:
    return isinstance(value, int) and _number(value) and 1 <= value <= MAX_CONTEXT


def _factors(value: object) -> bool:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_NUM_FACTORS:
        return False
    return all(_positive(item) for item in value)


_POSITIVE = (_positive, "must be a number above 0")
_FIELDS: dict[str, tuple[Check, str]] = {
    "factor": (lambda value: _number(value) and value >= 1, "must be a number of at least 1"),
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": (
        lambda value: _number(value) and 0 < value <= 1,
        "must be above 0, at most 1",
    ),
    "original_max_position_embeddings": (
        _length,
        f"must be a whole number from 1 to {MAX_CONTEXT}",
    ),
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": _POSITIVE,
    "mscale_all_dim": _POSITIVE,
    "truncate": (lambda value: isinstance(value, bool), "must be true or false"),
    "short_factor": (_factors, "must be a list of numbers above 0"),
    "long_factor": (_factors, "must be a list of numbers above 0"),
    "short_mscale": _POSITIVE,
    "long_mscale": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
}
_EVERYWHERE = ("rope_theta", "partial_rotary_factor")
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor", "short_mscale", "long_mscale"),
    ),
    "llama3": (
        (
            *("factor", "original_max_position_embeddings"),
            *("low_freq_factor", "high_freq_factor"),
        ),
        (),
    ),
    "proportional": (("partial_rotary_factor",), ("factor",)),
}
"""Fields that each way of stretching positions needs, and those that it also knows."""


def is_by_layer_type(rope: Mapping[str, Any]) -> bool:
    """One set of parameters for each type of layers, as in Gemma 3."""
    return bool(rope) and all(isinstance(value, Mapping) for value in rope.values())


def _check_rope(rope: dict[str, Any]) -> dict[str, Any]:
    if is_by_layer_type(rope):
        return {kind: _check_one(dict(value), f"{kind}: ") for kind, value in rope.items()}
    return _check_one(rope, "")


def _check_one(given: dict[str, Any], where: str) -> dict[str, Any]:
    rope = {("rope_type" if name == "type" else name): value for name, value in given.items()}
    if len(rope) < len(given):
        raise ValueError(f"{where}type is the old name of rope_type: give one of them")
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"{where}rope_type must be one of {', '.join(ROPE_TYPES)}; got {kind!r}")
    needed, also = ROPE_TYPES[kind]
    if missing := [name for name in needed if name not in rope]:
        raise ValueError(f"{where}rope_type {kind} needs {', '.join(missing)}")
    known = ("rope_type", *needed, *also, *_EVERYWHERE)
    for name, value in rope.items():
        if name not in known:
            names = ", ".join(dict.fromkeys(known))
            raise ValueError(f"{where}rope_type {kind} has no {name}; it has {names}")
        if name != "rope_type" and not _FIELDS[name][0](value):
            raise ValueError(f"{where}{name} {_FIELDS[name][1]}; got {value!r}")
    _check_together(rope, where)
    return rope


def _check_together(rope: Mapping[str, Any], where: str) -> None:
    if len(rope.get("short_factor", ())) != len(rope.get("long_factor", ())):
        raise ValueError(f"{where}short_factor and long_factor must be of one length")
    for lower, higher, defaults in (
        ("low_freq_factor", "high_freq_factor", (1, 4)),
        ("beta_slow", "beta_fast", (1, 32)),
    ):
        if not rope.get(lower, defaults[0]) < rope.get(higher, defaults[1]):
            raise ValueError(f"{where}{higher} must be above {lower}")


class ModelOverride(Settings):
    """What is used in place of what the model's config.json says.

    It is part of the model's identity: workers with different overrides are never paired.
    """

    rope_parameters: Annotated[dict[str, Any], AfterValidator(_check_rope)] | None = Field(
        None,
        validation_alias=AliasChoices("rope_parameters", "rope_scaling"),
        description="rope_type and its fields; of each layer type where the model has several",
    )
    max_position_embeddings: int | None = Field(
        None, ge=1, le=MAX_CONTEXT, strict=True, description="as the model itself is told"
    )
    max_context_tokens: int | None = Field(
        None, ge=1, le=MAX_CONTEXT, strict=True, description="of one request, prompt and answer"
    )

    @property
    def context_tokens(self) -> int | None:
        """Of one request, where that is overridden."""
        return self.max_context_tokens or self.max_position_embeddings


NO_OVERRIDE = ModelOverride()

OverrideConfig = Annotated[
    ModelOverride | None,
    Field(description="rope_parameters, max_position_embeddings, max_context_tokens of the model"),
]
