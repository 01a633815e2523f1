"""Logs of every process: events to stderr, one JSON object a line, or text on a terminal."""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor

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


def configure_logging(
    *, level: str = "info", as_json: bool | None = None, stream: TextIO | None = None
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
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(stream),
        # Lines are rare, and a cached logger would keep its stream in a process configured anew.
        cache_logger_on_first_use=False,
    )


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
