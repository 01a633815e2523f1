"""Lines on their way to a log: a bounded queue and one thread, so that no caller waits or fails."""

import io
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

MAX_NUM_LINES = 4096
MAX_BYTES = 4 << 20
"""Beyond either the queue takes no more lines: they are dropped and counted."""
BATCH_BYTES = 64 << 10
RETRY_S = 1.0
"""After a failed write; also how soon dropped lines are told of once writing works again."""
TIDY_S = 5.0
NEWLINE = ord("\n")

Notice = Callable[[int, str], bytes]
"""The line that says how many lines were dropped, and why."""


class Sink(Protocol):
    """Where lines end up. Only the writer's thread calls it."""

    def write(self, data: memoryview) -> int:
        """Write some of `data`; how many bytes, 0 if there was no room for a while.

        Raises `OSError` for what waiting does not cure.
        """

    def tidy(self) -> None:
        """Called while there is nothing to write; may raise `OSError`."""


class LogWriter:
    """Writes lines to a sink in the order in which they were put. Whoever makes it closes it.

    A line that cannot be written is dropped and counted. The next write that works begins with a
    line that says how many are missing.
    """

    def __init__(
        self,
        sink: Sink,
        notice: Notice,
        *,
        max_num_lines: int = MAX_NUM_LINES,
        max_bytes: int = MAX_BYTES,
        retry_s: float = RETRY_S,
    ) -> None:
        self._sink = sink
        self._notice = notice
        self._max_num_lines = max_num_lines
        self._max_bytes = max_bytes
        self._retry_s = retry_s
        # Its lock is reentrant: a finalizer that runs while a line is put may put another.
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_dropped = 0
        self._num_told = 0
        self._why = ""
        self._is_torn = False
        self._is_writing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    def put(self, line: bytes) -> None:
        """Queue a line that ends in a newline; never waits for the sink, never raises."""
        with self._changed:
            is_full = len(self._lines) >= self._max_num_lines
            if is_full or self._num_bytes + len(line) > self._max_bytes or self._closing.is_set():
                self._drop(1, "written too slowly")
                return
            self._lines.append(line)
            self._num_bytes += len(line)
            self._changed.notify_all()

    def flush(self, within_s: float) -> bool:
        """Wait until all that was put is written or dropped; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._lines and not self._is_writing, within_s
            )

    def close(self, within_s: float) -> None:
        """Take no more lines and write what is queued, for `within_s` at most."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(within_s)

    def _run(self) -> None:
        while (lines := self._next_lines()) is not None:
            try:
                if lines or self._num_dropped > self._num_told:
                    self._write(lines)
                else:
                    self._sink.tidy()
            except Exception as error:  # noqa: BLE001  without this thread every line would be lost
                self._pause(error)
            finally:
                with self._changed:
                    self._is_writing = False
                    self._changed.notify_all()

    def _next_lines(self) -> Sequence[bytes] | None:
        """What to write next; empty if nothing came for a while, None at the end."""
        with self._changed:
            wait_s = self._retry_s if self._num_dropped > self._num_told else TIDY_S
            self._changed.wait_for(lambda: bool(self._lines) or self._closing.is_set(), wait_s)
            if not self._lines and self._closing.is_set():
                return None
            taken: list[bytes] = []
            num_bytes = 0
            while self._lines and num_bytes < BATCH_BYTES:
                taken.append(self._lines.popleft())
                num_bytes += len(taken[-1])
            self._num_bytes -= num_bytes
            self._is_writing = True
            return taken

    def _write(self, lines: Sequence[bytes]) -> None:
        """Write the lines, the notice before them if some were dropped; counts those left out."""
        num_untold = self._num_dropped - self._num_told
        head = self._notice(num_untold, self._why) if num_untold else b""
        if self._is_torn:
            head = b"\n" + head  # the end of a line that was begun is lost
        data = memoryview(head + b"".join(lines))
        num_written = 0
        try:
            while num_written < len(data):
                num_bytes = self._sink.write(data[num_written:])
                if not num_bytes and self._closing.is_set():
                    raise BlockingIOError("nobody reads it")
                num_written += num_bytes
        finally:
            self._account(len(head), num_untold, lines, num_written)
            if num_written:
                self._is_torn = data[num_written - 1] != NEWLINE

    def _account(
        self, head_bytes: int, num_untold: int, lines: Sequence[bytes], num_written: int
    ) -> None:
        with self._changed:
            if num_written >= head_bytes:
                self._num_told += num_untold
            end = head_bytes
            for index, line in enumerate(lines):
                end += len(line)
                if end > num_written:
                    self._drop(len(lines) - index, "")
                    break

    def _pause(self, error: Exception) -> None:
        """A disk that is full stays full for a while; at the end nothing is tried twice."""
        strerror = error.strerror if isinstance(error, OSError) else None
        self._why = strerror or type(error).__name__
        self._closing.wait(self._retry_s)

    def _drop(self, count: int, why: str) -> None:
        self._num_dropped += count
        self._why = why or self._why


class LogStream(io.TextIOBase):
    """A text stream, such as `sys.stderr`, that never blocks and never fails: see `LogWriter`.

    Text goes on when its line is complete, or at a flush.
    """

    def __init__(
        self,
        writer: LogWriter,
        descriptor: int,
        *,
        encoding: str = "utf-8",
        errors: str = "backslashreplace",
        is_tty: bool = False,
    ) -> None:
        self._writer = writer
        self._descriptor = descriptor
        self._encoding = encoding
        self._errors = errors
        self._is_tty = is_tty
        self._begun = ""
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in typeshed
        return self._encoding

    def fileno(self) -> int:
        """What lies below; whoever writes to it himself may have to wait."""
        return self._descriptor

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._is_tty

    def write(self, text: str) -> int:
        with self._lock:
            whole, newline, self._begun = (self._begun + text).rpartition("\n")
            if newline:
                self._put(whole + newline)
        return len(text)

    def flush(self) -> None:
        with self._lock:
            text, self._begun = self._begun, ""
            if text:
                self._put(text)

    def _put(self, text: str) -> None:
        self._writer.put(text.encode(self._encoding, self._errors))
