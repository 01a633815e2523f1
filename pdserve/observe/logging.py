"""Logs of every process: one JSON object a line, or text on a terminal; they never hold it up."""

import contextlib
import faulthandler
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import structlog
from structlog.typing import EventDict, Processor

from pdserve.observe.log_sinks import STDERR, DescriptorSink, RotatingFile, reopen_without_blocking
from pdserve.observe.log_writer import LogStream, LogWriter

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

PRIVATE_FIELDS = frozenset(
    {"prompt", "text", "tokens", "token_ids", "prompt_token_ids", "stop", "headers", "metadata"}
)
"""Fields that could repeat what a client sent or received: their values never reach a log."""


class Stream(Protocol):
    """What log lines are written to."""

    def write(self, text: str, /) -> int: ...

    def isatty(self) -> bool: ...


LAST_LINES_S = 1.0
"""At the end of a process its last lines may take this long."""

_writers: list[LogWriter] = []
_num_unrendered = 0


def num_dropped_lines() -> int:
    """Log lines of this process that could not be written, since it started."""
    return _num_unrendered + sum(writer.num_dropped for writer in _writers)


@contextlib.contextmanager
def process_log(*, level: str, file: RotatingFile | None) -> Iterator[None]:
    """Send events and standard error to `file`, or to standard error as it was given.

    Nothing that is logged or printed to `sys.stderr` in this block waits for a disk or a reader,
    or raises: see `LogWriter`. What C libraries print, and the traceback of a crash, goes to the
    same place without a queue.
    """
    before = sys.stderr
    if file is None:
        reopen_without_blocking(STDERR)
    is_tty = file is None and os.isatty(STDERR)
    sink = file if file is not None else DescriptorSink(STDERR)
    writer = LogWriter(sink, _say_dropped_as_text if is_tty else say_dropped)
    _writers.append(writer)
    sys.stderr = stream = LogStream(writer, STDERR, is_tty=is_tty)
    with contextlib.suppress(OSError):  # no standard error at all
        faulthandler.enable(STDERR)
    configure_logging(level=level, as_json=not is_tty, stream=stream)
    try:
        yield
    finally:
        stream.flush()
        sys.stderr = before
        writer.close(LAST_LINES_S)


def flush_logs() -> None:
    """Write what is queued, before this process ends without leaving `process_log`."""
    for writer in _writers:
        writer.flush(LAST_LINES_S)


def configure_logging(
    *, level: str = "info", as_json: bool | None = None, stream: Stream | None = None
) -> None:
    """Set up structlog for this process; call once, before the first event.

    `as_json` None writes text where `stream` (stderr if left out) is a terminal, else JSON. Bind
    what names the process with `structlog.contextvars.bind_contextvars(worker_id=...)`.
    """
    stream = stream if stream is not None else sys.stderr
    as_json = not stream.isatty() if as_json is None else as_json
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _hide_private_fields,
            *_renderers(as_json),
        ],
        wrapper_class=_never_raising(LEVELS[level]),
        logger_factory=lambda *_: _Lines(stream),
        # Lines are rare, and a cached logger would keep its stream in a process configured anew.
        cache_logger_on_first_use=False,
    )


class _Lines:
    """What structlog calls with a rendered event, by the name of its level."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        self._stream.write(f"{line}\n")

    debug = info = warn = warning = error = critical = exception = msg


def _never_raising(level: int) -> type[Any]:
    """Loggers whose callers are not harmed by what they log, nor by where it goes."""
    filtering: type[Any] = structlog.make_filtering_bound_logger(level)

    class NeverRaising(filtering):  # type: ignore[misc]
        def _proxy_to_logger(self, method_name: str, *args: Any, **fields: Any) -> Any:
            global _num_unrendered
            try:
                return super()._proxy_to_logger(method_name, *args, **fields)
            except Exception:  # noqa: BLE001
                _num_unrendered += 1
                return None

    return NeverRaising


def _renderers(as_json: bool) -> list[Processor]:
    if as_json:
        return [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    # Rich tracebacks show local variables, prompts among them.
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=plain)]


def _hide_private_fields(
    _logger: object, _method: str, event: MutableMapping[str, object]
) -> EventDict:
    for name in PRIVATE_FIELDS & event.keys():
        event[name] = "(hidden)"
    return event


def say_dropped(count: int, why: str) -> bytes:
    """The line that tells of lines that are missing."""
    line = {"event": "log.dropped", "level": "warning", "num_lines": count, "why": why}
    return json.dumps(line | {"timestamp": _now()}).encode() + b"\n"


def _say_dropped_as_text(count: int, why: str) -> bytes:
    return f"{_now()} [warning  ] log.dropped num_lines={count} why={why!r}\n".encode()


def _now() -> str:
    stamped = structlog.processors.TimeStamper(fmt="iso", utc=True)(None, "", {})
    return str(stamped["timestamp"])
