"""Request traces in files: our CSV and JSONL, Azure's CSV, Mooncake's JSONL.

    our CSV, JSONL     arrival_s or unit_interarrival, prompt_tokens, output_tokens,
                       optional prefix_blocks (ids separated by spaces; in JSONL a list)
                       and slo_class (its number, from 0)
    Azure CSV          TIMESTAMP, ContextTokens, GeneratedTokens
    Mooncake JSONL     timestamp (ms), input_length, output_length, hash_ids

Every complaint names the file and the line.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

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

OWN = ("prompt_tokens", "output_tokens")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")
MAX_TOKENS = 100_000_000


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
    rows = chain([first], rows)
    if set(AZURE) <= names:
        return _read_azure(rows, source)
    if set(MOONCAKE) <= names:
        return _read_mooncake(rows, source)
    if set(OWN) <= names and names & {"arrival_s", "unit_interarrival"}:
        return _read_own(rows, source, names)
    raise LocalFault(
        f"{source}:1: expected arrival_s or unit_interarrival, prompt_tokens, output_tokens; or "
        f"{', '.join(AZURE)}; or {', '.join(MOONCAKE)}; got {', '.join(sorted(names))[:200]}"
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


def _read_own(rows: Iterator[tuple[int, Row]], source: str, names: set[str]) -> Workload:
    is_absolute = "arrival_s" in names
    time_name = "arrival_s" if is_absolute else "unit_interarrival"
    columns = _Columns()
    for line, row in rows:
        where = f"{source}:{line}"
        columns.times.append(_seconds(row, time_name, where))
        if is_absolute:
            _check_order(columns.times, where, time_name)
        columns.prompts.append(_count(row, "prompt_tokens", where, least=1))
        columns.outputs.append(_count(row, "output_tokens", where, least=0))
        if "prefix_blocks" in names:
            _add_prefix(columns, row.get("prefix_blocks"), where)
        if "slo_class" in names:
            columns.classes.append(_count(row, "slo_class", where, least=0))
    times = np.array(columns.times)
    if is_absolute:
        return _workload(columns, source, arrival_s=times)
    return _workload(columns, source, unit_gaps=times)


def _read_azure(rows: Iterator[tuple[int, Row]], source: str) -> Workload:
    columns = _Columns()
    for line, row in rows:
        where = f"{source}:{line}"
        columns.times.append(_stamp(row, where))
        _check_order(columns.times, where, "TIMESTAMP")
        columns.prompts.append(_count(row, "ContextTokens", where, least=1))
        columns.outputs.append(_count(row, "GeneratedTokens", where, least=1))
    times = np.array(columns.times)
    return _workload(columns, source, arrival_s=times - times[0])


def _read_mooncake(rows: Iterator[tuple[int, Row]], source: str) -> Workload:
    columns = _Columns()
    for line, row in rows:
        where = f"{source}:{line}"
        columns.times.append(_seconds(row, "timestamp", where) / 1e3)
        _check_order(columns.times, where, "timestamp")
        columns.prompts.append(_count(row, "input_length", where, least=1))
        columns.outputs.append(_count(row, "output_length", where, least=1))
        _add_prefix(columns, row.get("hash_ids", []), where)
    times = np.array(columns.times)
    spread = _spread(times - times[0])
    notes: tuple[str, ...] = ()
    if not np.array_equal(spread, times - times[0]):
        notes = ("stamps are coarse: requests of one stamp were spread evenly up to the next",)
    return _workload(columns, source, notes=notes, arrival_s=spread)


def _spread(times: Floats) -> Floats:
    """Spread equal stamps over the stamp's own width, which is the smallest gap between two."""
    stamps, counts = np.unique(times, return_counts=True)
    if len(stamps) < 2 or counts.max() == 1:
        return times
    width = float(np.diff(stamps).min())
    place = np.arange(len(times)) - np.repeat(np.cumsum(counts) - counts, counts)
    return times + place * width / np.repeat(counts, counts)


def _workload(
    columns: _Columns,
    source: str,
    *,
    notes: tuple[str, ...] = (),
    arrival_s: Floats | None = None,
    unit_gaps: Floats | None = None,
) -> Workload:
    starts: Ints | None = None
    ids: Ints | None = None
    if columns.prefix_counts:
        starts = np.concatenate([[0], np.cumsum(columns.prefix_counts)]).astype(np.int64)
        _, dense = np.unique(np.array(columns.prefix_ids, np.int64), return_inverse=True)
        ids = dense.astype(np.int64)
    return Workload(
        prompt_tokens=np.array(columns.prompts, np.int64),
        output_tokens=np.array(columns.outputs, np.int64),
        arrival_s=arrival_s,
        unit_gaps=unit_gaps,
        prefix_starts=starts,
        prefix_ids=ids,
        prefix_block_tokens=DEFAULT_PREFIX_BLOCK,
        class_index=np.array(columns.classes, np.int64) if columns.classes else None,
        source=source,
        notes=notes,
    )


def _check_order(times: Sequence[float], where: str, name: str) -> None:
    if len(times) > 1 and times[-1] < times[-2]:
        raise LocalFault(
            f"{where}: {name}: requests must be sorted by time; got {times[-1]:g} "
            f"after {times[-2]:g}"
        )


def _seconds(row: Row, name: str, where: str) -> float:
    try:
        return seconds(row.get(name))
    except (TypeError, ValueError):
        raise LocalFault(
            f"{where}: {name}: expected a number, 0 or more; got {str(row.get(name))[:40]!r}"
        ) from None


def _stamp(row: Row, where: str) -> float:
    try:
        return seconds_of_stamp(row["TIMESTAMP"])
    except ValueError:
        raise LocalFault(
            f"{where}: TIMESTAMP: expected a time like 2023-11-16 18:17:03.97; "
            f"got {str(row['TIMESTAMP'])[:40]!r}"
        ) from None


def _count(row: Row, name: str, where: str, *, least: int) -> int:
    value = row.get(name)
    try:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise TypeError
        count = int(value)
        if not least <= count <= MAX_TOKENS:
            raise ValueError
    except (TypeError, ValueError):
        raise LocalFault(
            f"{where}: {name}: expected a whole number, {least} to {MAX_TOKENS}; "
            f"got {str(value)[:40]!r}"
        ) from None
    return count


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
