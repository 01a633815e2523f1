"""Standard output and error of commands: they take any text, and outlive whoever reads them."""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from pdserve.cli.problems import EXIT_FAILED

ERRORS = "pdserve.readable"
LOOKALIKES = {"\u2588": "#", "\u2591": "-", "\u2192": "->", "\u2026": "...", "\u2013": "-"}
"""For bars and arrows on streams that have none; other characters become escapes: \\u65e5."""
LOST = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EAGAIN)
LAST_LINES_S = 1.0


@contextlib.contextmanager
def command_output() -> Iterator[None]:
    """Let this block print any text; if the output cannot be written, exit with code 1.

    Whoever closed a pipe knows that he did; of a full disk one line tells.
    """
    _take_any_text()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in LOST:
            raise
        _give_up(error)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let this block print whatever becomes of its readers: nothing waits for them or fails.

    For commands that have more to do than to print: what cannot be written is dropped.
    """
    from pdserve.observe.log_sinks import DescriptorSink, reopen_without_blocking
    from pdserve.observe.log_writer import LogStream, LogWriter

    def lasting(stream: TextIO) -> TextIO:
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):
            return stream  # a test's own
        stream.flush()
        reopen_without_blocking(descriptor)
        writer = LogWriter(DescriptorSink(descriptor), _say_dropped)
        closing.callback(writer.close, LAST_LINES_S)
        lasting = LogStream(
            writer,
            descriptor,
            encoding=stream.encoding,
            errors=stream.errors or ERRORS,
            is_tty=stream.isatty(),
        )
        closing.callback(lasting.flush)
        return lasting  # type: ignore[return-value]  # all of a TextIO that is used

    with (
        contextlib.ExitStack() as closing,
        contextlib.redirect_stdout(lasting(sys.stdout)),
        contextlib.redirect_stderr(lasting(sys.stderr)),
    ):
        yield


def _say_dropped(count: int, why: str) -> bytes:
    return f"pdserve: {count} lines of output are missing: {why}\n".encode()


def _take_any_text() -> None:
    codecs.register_error(ERRORS, _readable)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            nowhere = open(os.devnull, "w", encoding="utf-8", errors=ERRORS)  # noqa: SIM115
            setattr(sys, name, nowhere)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def _readable(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that a stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    escaped = (LOOKALIKES.get(each) or ascii(each)[1:-1] for each in text)
    return "".join(escaped), error.end


def _give_up(error: OSError) -> None:
    # What is still buffered must not fail once more when the interpreter ends.
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        with contextlib.suppress(OSError):
            print(f"pdserve: cannot write the output: {error.strerror}", file=sys.stderr)
    sys.exit(EXIT_FAILED)
