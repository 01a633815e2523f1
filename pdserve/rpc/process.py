"""Running one process of a cluster: settings in, one ready line out, drain on SIGTERM."""

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import uvloop
import yaml

from pdserve.config.base import lay_over, parse_assignment, parse_settings, read_yaml
from pdserve.config.processes import RouterSettings, WorkerSettings
from pdserve.domain.errors import LocalFault, PdserveError
from pdserve.observe.log_sinks import STDERR, RotatingFile, reopen_without_blocking
from pdserve.observe.logging import flush_logs, process_log

S = TypeVar("S", RouterSettings, WorkerSettings)
EXIT_FAILED = 1
EXIT_BAD_START = 2
STDIN = 0
STDOUT = 1
PR_SET_PDEATHSIG = 1

OnReady = Callable[..., None]
"""Called once with what others must know of the process: address=..., internal_address=..."""

ServeProcess = Callable[[S, OnReady, asyncio.Event], Awaitable[None]]
"""Serves until the event is set, then drains and returns."""


Prepare = Callable[[S], ServeProcess[S]]
"""What must be done before any thread and event loop exist; returns what serves."""


def run_process(kind: type[S], prepare: Prepare[S], doc: str) -> None:
    """The whole `__main__` of a role; exits 0 after a drain, 2 with a message on a bad start."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--settings", required=True, help="YAML or JSON file; - reads stdin")
    parser.add_argument(
        "--set",
        dest="assignments",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a field over the file's, such as engine.num_blocks=2048; may be repeated",
    )
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="drain when the starting process dies"
    )
    parser.add_argument(
        "--die-with-parent",
        action="store_true",
        help="end at once when the starting process dies: another may take this one's place",
    )
    arguments = parser.parse_args()
    if arguments.exit_with_parent:
        _on_parent_death(signal.SIGTERM)
    if arguments.die_with_parent:
        _on_parent_death(signal.SIGKILL)
    _open_standard_files()
    is_ready = False

    def on_ready(**addresses: str) -> None:
        nonlocal is_ready
        is_ready = True
        _print_line(ready=True, pid=os.getpid(), **addresses)

    try:
        given = lay_over(_read(arguments.settings), map(parse_assignment, arguments.assignments))
        settings = parse_settings(kind, given, source="settings")
        serve = prepare(settings)
        with process_log(level=settings.log_level, file=_log_file(settings)):
            try:
                uvloop.run(_serve_until_signal(serve, settings, on_ready))
            except (PdserveError, ExceptionGroup) as group:
                error = _first_known(group)
                if is_ready and error is not None:
                    print(error.message, file=sys.stderr)
                raise
    except (PdserveError, ExceptionGroup) as group:
        error = _first_known(group)
        if error is None:
            raise
        if is_ready:
            sys.exit(EXIT_FAILED)
        _print_line(ready=False, error=error.message)
        sys.exit(EXIT_BAD_START)
    # All is closed; taking the interpreter apart (torch, grpc) would only take seconds.
    os._exit(0)


def _open_standard_files() -> None:
    """Have all three, so that no other file gets their numbers; waiting for none that is read."""
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
    reopen_without_blocking(STDOUT)


def _log_file(settings: RouterSettings | WorkerSettings) -> RotatingFile | None:
    if not settings.log_file:
        return None
    return RotatingFile(
        Path(settings.log_file),
        max_bytes=settings.max_log_bytes,
        num_files=settings.num_log_files,
        is_stderr=True,
    )


def _read(source: str) -> object:
    if source != "-":
        return read_yaml(Path(source))
    try:
        return yaml.safe_load(sys.stdin.buffer.read())
    except yaml.YAMLError:
        raise LocalFault("settings on stdin are not YAML") from None


async def _serve_until_signal(serve: ServeProcess[S], settings: S, on_ready: OnReady) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_or_quit, stop)
    await serve(settings, on_ready, stop)


def _stop_or_quit(stop: asyncio.Event) -> None:
    if stop.is_set():  # asked twice: the person does not want to wait
        flush_logs()
        os._exit(130)
    stop.set()


def _first_known(error: BaseException) -> PdserveError | None:
    if isinstance(error, PdserveError):
        return error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            if known := _first_known(inner):
                return known
    return None


def _print_line(**fields: Any) -> None:
    """One line on stdout, for whoever started this process; serving does not depend on a reader."""
    with contextlib.suppress(OSError):
        os.write(STDOUT, json.dumps(fields).encode() + b"\n")


def _on_parent_death(number: signal.Signals) -> None:
    """Linux: have the kernel send a signal when the parent dies, however it dies."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(EXIT_BAD_START)  # it died before we asked
