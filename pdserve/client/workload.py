"""What to ask for and when: request traces, Poisson arrivals, prompts of a wanted length."""

import csv
import gzip
import importlib.resources
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TypeVar

from pdserve.domain.errors import LocalFault

T = TypeVar("T")
Row = Mapping[str, object]

PACKAGED_TRACES = {
    "azure-code": "azure-code.csv",
    "azure-code-all": "azure-code-all.csv.gz",
    "azure-conv": "azure-conv.csv.gz",
}
PLAIN_FIELDS = ("arrival_s", "prompt_tokens", "output_tokens")
AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
FIRST_TEXT_TOKEN_ID = 16
"""Ids below are left out of made-up prompts: tokenizers keep their control tokens there."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload: `arrival_s` after its start."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(name_or_path: str) -> tuple[TraceRequest, ...]:
    """Read a packaged trace by name, or a file; the first request arrives at 0.

    Files: CSV with the columns arrival_s,prompt_tokens,output_tokens or TIMESTAMP,ContextTokens,
    GeneratedTokens (Azure), or one JSON object a line with the first three names. Raises
    `LocalFault` naming file and line.
    """
    text = trace_text(name_or_path)
    if text.lstrip().startswith("{"):
        rows = json_rows(text, name_or_path)
        return _from_start(_parse_rows(rows, PLAIN_FIELDS, seconds, name_or_path))
    header = {name.strip() for name in next(csv.reader(text.splitlines()), [])}
    if set(PLAIN_FIELDS) <= header:
        fields, time_of = PLAIN_FIELDS, seconds
    elif set(AZURE_FIELDS) <= header:
        fields, time_of = AZURE_FIELDS, seconds_of_stamp
    else:
        raise LocalFault(
            f"{name_or_path}:1: expected the columns {','.join(PLAIN_FIELDS)} or "
            f"{','.join(AZURE_FIELDS)}"
        )
    rows = csv_rows(text, name_or_path)
    return _from_start(_parse_rows(rows, fields, time_of, name_or_path))


def trace_text(name_or_path: str) -> str:
    """The text of a packaged trace, by its name, or of a file; raises `LocalFault`."""
    if name_or_path in PACKAGED_TRACES:
        file_name = PACKAGED_TRACES[name_or_path]
        content = (importlib.resources.files("pdserve") / "data/traces" / file_name).read_bytes()
        return (gzip.decompress(content) if file_name.endswith(".gz") else content).decode()
    try:
        return Path(name_or_path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = ", ".join(PACKAGED_TRACES)
        raise LocalFault(f"{name_or_path}: no such trace file; packaged traces: {known}") from None
    except UnicodeDecodeError as error:
        raise LocalFault(f"{name_or_path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise LocalFault(f"{name_or_path}: {error.strerror}") from None


def fit_to_context(
    requests: Sequence[TraceRequest], max_context_tokens: int
) -> tuple[TraceRequest, ...]:
    """Shrink lengths so that prompt and output fit a model's context together.

    Outputs are cut at a quarter of the context. If a prompt then does not fit, all prompts shrink
    by one factor, which keeps the shape of their distribution.
    """
    max_output = max(1, max_context_tokens // 4)
    cut = [replace(r, output_tokens=min(r.output_tokens, max_output)) for r in requests]
    factor = min(
        ((max_context_tokens - r.output_tokens) / r.prompt_tokens for r in cut), default=1.0
    )
    if factor >= 1:
        return tuple(cut)
    return tuple(replace(r, prompt_tokens=max(1, int(r.prompt_tokens * factor))) for r in cut)


def scale_time(requests: Sequence[TraceRequest], factor: float) -> tuple[TraceRequest, ...]:
    """Multiply every arrival time: 0.5 sends twice as fast."""
    return tuple(replace(r, arrival_s=r.arrival_s * factor) for r in requests)


def with_poisson_arrivals(
    requests: Sequence[TraceRequest], *, rate: float, seed: int
) -> tuple[TraceRequest, ...]:
    """Keep the lengths; draw exponential gaps of mean 1 / `rate` between arrivals."""
    random, now_s = Random(seed), 0.0
    placed: list[TraceRequest] = []
    for request in requests:
        placed.append(replace(request, arrival_s=now_s))
        now_s += random.expovariate(rate)
    return tuple(placed)


def make_prompt(num_tokens: int, *, vocab_size: int, seed: int) -> tuple[int, ...]:
    """`num_tokens` random token ids; the same seed makes the same prompt."""
    first = FIRST_TEXT_TOKEN_ID if vocab_size > FIRST_TEXT_TOKEN_ID else 0
    return tuple(Random(seed).choices(range(first, vocab_size), k=num_tokens))


def _from_start(requests: Iterable[TraceRequest]) -> tuple[TraceRequest, ...]:
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    start_s = ordered[0].arrival_s
    return tuple(replace(r, arrival_s=r.arrival_s - start_s) for r in ordered)


def csv_rows(text: str, source: str) -> Iterator[tuple[int, Row]]:
    """Each row with its line; raises `LocalFault` for one of another length than the header."""
    rows = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip() for name in next(rows, [])]
    for cells in filter(None, rows):
        if len(cells) != len(header):
            raise LocalFault(
                f"{source}:{rows.line_num}: expected {len(header)} cells, got {len(cells)}"
            )
        yield rows.line_num, dict(zip(header, cells, strict=True))


def json_rows(text: str, source: str) -> Iterator[tuple[int, Row]]:
    """Each line's object with the line; raises `LocalFault` for what is none."""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LocalFault(f"{source}:{number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise LocalFault(f"{source}:{number}: expected a JSON object")
        yield number, row


def _parse_rows(
    rows: Iterable[tuple[int, Row]],
    fields: tuple[str, str, str],
    time_of: Callable[[object], float],
    source: str,
) -> list[TraceRequest]:
    time_field, prompt_field, output_field = fields
    requests = [
        TraceRequest(
            arrival_s=_value(row, time_field, time_of, f"{source}:{number}"),
            prompt_tokens=_value(row, prompt_field, _positive, f"{source}:{number}"),
            output_tokens=_value(row, output_field, _positive, f"{source}:{number}"),
        )
        for number, row in rows
    ]
    if not requests:
        raise LocalFault(f"{source}: no requests in it")
    return requests


def _value(row: Row, field: str, read: Callable[[object], T], where: str) -> T:
    if field not in row:
        raise LocalFault(f"{where}: {field} missing")
    try:
        return read(row[field])
    except (TypeError, ValueError, OverflowError):
        shown = str(row[field])[:40]
        raise LocalFault(f"{where}: {field}: expected {_WANTED[read]}; got {shown!r}") from None


def seconds(value: object) -> float:
    """A finite number, 0 or more; raises `TypeError` or `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    found = float(value)
    if not (math.isfinite(found) and found >= 0):
        raise ValueError
    return found


def seconds_of_stamp(value: object) -> float:
    """An ISO time in seconds; raises `ValueError` for anything else."""
    stamp = datetime.fromisoformat(str(value).strip())
    # Without a zone it is taken as UTC: local time has hours that come twice.
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()


def _positive(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    count = int(value)
    if count < 1:
        raise ValueError
    return count


_WANTED: Mapping[Callable[[object], object], str] = {
    seconds: "a number of seconds, 0 or more",
    seconds_of_stamp: "a time like 2023-11-16 18:17:03.97",
    _positive: "a whole number, 1 or more",
}
