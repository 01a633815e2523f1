"""Values and protobuf messages most of whose fields have the same names and contents."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def message_of(kind: Callable[..., T], value: Any, **others: Any) -> T:
    """The message with all fields of a value; `others` are those that it has in another form."""
    names = _names(value.__class__)
    return kind(**others, **{name: getattr(value, name) for name in names if name not in others})


def value_of(kind: Callable[..., T], message: Any, **others: Any) -> T:
    """The reverse."""
    names = _names(kind)
    return kind(**others, **{name: getattr(message, name) for name in names if name not in others})


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind) if field.init)
