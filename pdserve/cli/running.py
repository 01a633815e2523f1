"""Running a command's coroutine; Ctrl-C ends it quietly."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import typer

EXIT_INTERRUPTED = 130


def run(start: Callable[[], Coroutine[Any, Any, int | None]]) -> None:
    """Run to the end and exit with the code that the coroutine returns, 0 for None."""
    try:
        code = asyncio.run(start())
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if code:
        raise typer.Exit(code)
