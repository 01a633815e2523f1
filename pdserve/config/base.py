"""Reading settings: one place turns a bad file into a message that says what to do."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeGuard, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pdserve.domain.errors import LocalFault


class Settings(BaseModel):
    """Base of all settings: unknown names are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}  # fields of earlier versions to what they are called


S = TypeVar("S", bound=Settings)


def parse_settings(kind: type[S], data: object, *, source: str) -> S:
    """Check `data` against `kind`; raises `LocalFault` naming source, field, rule and value."""
    if not isinstance(data, Mapping):
        raise LocalFault(f"{source}: expected a mapping of settings, got {type(data).__name__}")
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        lines = [_explain(kind, dict(issue)) for issue in error.errors(include_url=False)]
        raise LocalFault(f"{source}: " + "; ".join(lines)) from None


def parse_assignment(text: str) -> tuple[str, object]:
    """`router.port=7500` as name and YAML value; raises `LocalFault` for anything else."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise LocalFault(f"--set {text}: expected NAME=VALUE, such as timers.drain_s=5")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise LocalFault(f"--set {text}: the value is not YAML") from None


def parse_object(option: str, text: str | None) -> object:
    """The JSON or YAML object that `option` was given; None for none."""
    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise LocalFault(f'{option} {text}: expected an object, such as {{"name": 1}}')
    return value


def lay_over(data: object, assignments: Iterable[tuple[str, object]]) -> object:
    """`data` with `("router.port", 7500)` laid over it; what is no mapping stays for parsing."""
    if not isinstance(data, Mapping):
        return data
    laid = dict(data)
    for name, value in assignments:
        _put(laid, name.split("."), value)
    return laid


def _put(data: dict[str, object], path: list[str], value: object) -> None:
    for part in path[:-1]:
        nested = data.get(part, {})
        if not isinstance(nested, Mapping):
            return  # the file's value has the wrong type: parsing says so
        data[part] = dict(nested)
        data = cast(dict[str, object], data[part])
    data[path[-1]] = value


def read_yaml(path: Path) -> object:
    """Load a YAML file; raises `LocalFault` with the line of a syntax error."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LocalFault(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise LocalFault(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise LocalFault(f"{path}: {error.strerror}") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not YAML"
        raise LocalFault(f"{where}: {problem}") from None


def _explain(kind: type[Settings], issue: dict[str, object]) -> str:
    location = issue["loc"]
    assert isinstance(location, tuple)
    field = ".".join(str(part) for part in location) or "settings"
    if issue["type"] != "extra_forbidden":
        rule = str(issue["msg"]).removeprefix("Value error, ")
        is_scalar = isinstance(issue["input"], str | int | float | bool | None)
        return f"{field}: {rule}; got {issue['input']!r}" if is_scalar else f"{field}: {rule}"
    owner = _kind_at(kind, location[:-1])
    known, name = list(owner.model_fields), str(location[-1])
    if name in owner.renamed:
        return f"{field}: is called {owner.renamed[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
    return f"{field}: unknown field; {hint}"


def _alternatives(annotation: object) -> tuple[Any, ...]:
    """X and None of `X | None`."""
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _is_settings(annotation: object) -> TypeGuard[type[Settings]]:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _kind_at(kind: type[Settings], path: tuple[object, ...]) -> type[Settings]:
    """What holds the fields at `path`; `Settings`, which has none, inside of a list."""
    for part in path:
        field = kind.model_fields.get(str(part))
        alternatives = _alternatives(field.annotation) if field else ()
        kind = next(filter(_is_settings, alternatives), Settings)
    return kind
