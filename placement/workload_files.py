"""Request traces in files: our CSV and JSONL, Azure's CSV, Mooncake's JSONL.

    our CSV, JSONL     arrival_s or unit_interarrival, prompt_tokens, output_tokens,
                       optional prefix_blocks (ids separated by spaces; in JSONL a list)
                       and slo_class (its number, from 0)
    Azure CSV          TIMESTAMP, ContextTokens, GeneratedTokens
    Mooncake JSONL     timestamp (ms), input_length, output_length, hash_ids

Every complaint names the file and the line.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from pdserve.client.workload import (
    Row,
    csv_rows,
    json_rows,
    seconds,
    seconds_of_stamp,
    trace_text,
)
from pdserve.domain.errors import LocalFault
from placement.demand import DEFAULT_PREFIX_BLOCK, Floats, Ints, Workload

T = TypeVar("T")

MAX_TOKENS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How a kind of trace names its columns, and what it writes into them."""

    columns: tuple[str, str, str]  # time, prompt tokens, output tokens
    read_time: Callable[[object], float] = seconds
    expected: str = "a number, 0 or more"
    per_second: float = 1.0
    least_output: int = 1
    prefix: str = ""
    slo_class: str = ""


OWN = ("prompt_tokens", "output_tokens")
RECORDED, UNIT_GAPS = (
    _Form(columns=(time, *OWN), least_output=0, prefix="prefix_blocks", slo_class="slo_class")
    for time in ("arrival_s", "unit_interarrival")
)
AZURE = _Form(
    columns=("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    read_time=seconds_of_stamp,
    expected="a time like 2023-11-16 18:17:03.97",
)
MOONCAKE = _Form(
    columns=("timestamp", "input_length", "output_length"), per_second=1e3, prefix="hash_ids"
)


@dataclass(slots=True)
class _Columns:
    """What has been read so far."""

    times: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    prefix_counts: list[int] = field(default_factory=list)
    prefix_ids: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)


def read_workload(path: Path) -> Workload:
    """Read a trace in any of the forms, or a packaged one by its name.

    Raises `LocalFault` naming file and line.
    """
    source = str(path)
    text = trace_text(source)
    if not text.strip():
        raise LocalFault(f"{source}:1: the file is empty")
    rows = (json_rows if text.lstrip().startswith("{") else csv_rows)(text, source)
    first = next(rows, None)
    if first is None:
        raise LocalFault(f"{source}:2: no requests in it")
    names = set(first[1])
    for form in (AZURE, MOONCAKE, RECORDED, UNIT_GAPS):
        if set(form.columns) <= names:
            return _read(chain([first], rows), source, form, names)
    raise LocalFault(
        f"{source}:1: expected arrival_s or unit_interarrival, prompt_tokens, output_tokens; or "
        f"{', '.join(AZURE.columns)}; or {', '.join(MOONCAKE.columns)}; "
        f"got {', '.join(sorted(names))[:200]}"
    )


def format_workload(workload: Workload) -> str:
    """Our CSV as text."""
    times = workload.arrival_s if workload.arrival_s is not None else workload.unit_gaps
    assert times is not None
    name = "arrival_s" if workload.arrival_s is not None else "unit_interarrival"
    starts, ids = workload.prefix_starts, workload.prefix_ids
    out = io.StringIO()
    has_prefixes = starts is not None and ids is not None
    columns = [name, *OWN, *(["prefix_blocks"] if has_prefixes else [])]
    out.write(",".join(columns) + "\n")
    for row in range(len(workload)):
        cells = [repr(float(times[row]))]
        cells += [str(workload.prompt_tokens[row]), str(workload.output_tokens[row])]
        if starts is not None and ids is not None:
            cells.append(" ".join(map(str, ids[starts[row] : starts[row + 1]])))
        out.write(",".join(cells) + "\n")
    return out.getvalue()


def _read(rows: Iterator[tuple[int, Row]], source: str, form: _Form, names: set[str]) -> Workload:
    time, prompt, output = form.columns
    columns = _Columns()
    for line, row in rows:
        where = f"{source}:{line}"
        at = _value(row, time, where, form.read_time, form.expected)
        columns.times.append(at / form.per_second)
        if form is not UNIT_GAPS:
            _check_order(columns.times, where, time)
        columns.prompts.append(_count(row, prompt, where, least=1))
        columns.outputs.append(_count(row, output, where, least=form.least_output))
        if form is MOONCAKE or (form.prefix and form.prefix in names):
            _add_prefix(columns, row.get(form.prefix), where)
        if form.slo_class and form.slo_class in names:
            columns.classes.append(_count(row, form.slo_class, where, least=0))
    times = np.array(columns.times)
    if form is UNIT_GAPS:
        return replace(_workload(columns, source), unit_gaps=times)
    if form is RECORDED:
        return replace(_workload(columns, source), arrival_s=times)
    times = times - times[0]
    spread = _spread(times) if form is MOONCAKE else times
    notes: tuple[str, ...] = ()
    if not np.array_equal(spread, times):
        notes = ("stamps are coarse: requests of one stamp were spread evenly up to the next",)
    return replace(_workload(columns, source), arrival_s=spread, notes=notes)


def _spread(times: Floats) -> Floats:
    """Spread equal stamps over the stamp's own width, which is the smallest gap between two."""
    stamps, counts = np.unique(times, return_counts=True)
    if len(stamps) < 2 or counts.max() == 1:
        return times
    width = float(np.diff(stamps).min())
    place = np.arange(len(times)) - np.repeat(np.cumsum(counts) - counts, counts)
    return times + place * width / np.repeat(counts, counts)


def _workload(columns: _Columns, source: str) -> Workload:
    """All but the times."""
    starts: Ints | None = None
    ids: Ints | None = None
    if columns.prefix_counts:
        starts = np.concatenate([[0], np.cumsum(columns.prefix_counts)]).astype(np.int64)
        _, dense = np.unique(np.array(columns.prefix_ids, np.int64), return_inverse=True)
        ids = dense.astype(np.int64)
    return Workload(
        prompt_tokens=np.array(columns.prompts, np.int64),
        output_tokens=np.array(columns.outputs, np.int64),
        prefix_starts=starts,
        prefix_ids=ids,
        prefix_block_tokens=DEFAULT_PREFIX_BLOCK,
        class_index=np.array(columns.classes, np.int64) if columns.classes else None,
        source=source,
    )


def _check_order(times: Sequence[float], where: str, name: str) -> None:
    if len(times) > 1 and times[-1] < times[-2]:
        raise LocalFault(
            f"{where}: {name}: requests must be sorted by time; got {times[-1]:g} "
            f"after {times[-2]:g}"
        )


def _value(row: Row, name: str, where: str, read: Callable[[object], T], expected: str) -> T:
    try:
        return read(row.get(name))
    except (TypeError, ValueError):
        raise LocalFault(
            f"{where}: {name}: expected {expected}; got {str(row.get(name))[:40]!r}"
        ) from None


def _count(row: Row, name: str, where: str, *, least: int) -> int:
    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise TypeError
        count = int(value)
        if not least <= count <= MAX_TOKENS:
            raise ValueError
        return count

    return _value(row, name, where, read, f"a whole number, {least} to {MAX_TOKENS}")


def _add_prefix(columns: _Columns, value: object, where: str) -> None:
    items = value.split() if isinstance(value, str) else value
    if items is None:
        items = []
    if not isinstance(items, list):
        raise LocalFault(f"{where}: prefix blocks: expected a list of ids; got {type(items)}")
    try:
        ids = [int(item) for item in items]
    except (TypeError, ValueError):
        raise LocalFault(f"{where}: prefix blocks: expected whole numbers") from None
    columns.prefix_counts.append(len(ids))
    columns.prefix_ids += ids
