"""Where log lines end up: a file of bounded size, or a descriptor that is open already."""

import contextlib
import os
import select
import stat
from collections.abc import Sequence
from pathlib import Path

ROOM_WITHIN_S = 0.5
STDERR = 2


class DescriptorSink:
    """A pipe, a terminal or a file that somebody else opened; see `reopen_without_blocking`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            room = select.poll()
            room.register(self._descriptor, select.POLLOUT)
            room.poll(ROOM_WITHIN_S * 1000)
            return 0

    def tidy(self) -> None:
        """Nothing to do: its size is its owner's business."""


class RotatingFile:
    """A log file that is renamed to PATH.1 when it is full, PATH.1 to PATH.2, and so on.

    No more than `num_files` exist, each of `max_bytes` at most. With `is_stderr` the file is also
    the process's standard error, so that what C libraries and a crash print is in it and counts.
    It is opened again if somebody else moved or removed it.
    """

    def __init__(
        self, path: Path, *, max_bytes: int, num_files: int, is_stderr: bool = False
    ) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._num_files = num_files
        self._descriptor: int | None = STDERR if is_stderr else None
        self._is_stderr = is_stderr

    def write(self, data: memoryview) -> int:
        size = self._open()
        if size and size + len(data) > self._max_bytes:
            self._rotate()
        assert self._descriptor is not None
        return os.write(self._descriptor, data)

    def tidy(self) -> None:
        """Rotate when others wrote too much to standard error."""
        if self._open() > self._max_bytes:
            self._rotate()

    def close(self) -> None:
        """Standard error stays open: it is the process's."""
        if self._descriptor is not None and not self._is_stderr:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """Have the file at `path` open; its size."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                mine, named = os.fstat(self._descriptor), os.stat(self.path)
                if (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino):
                    return mine.st_size
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o640)
        if self._is_stderr:
            os.dup2(descriptor, STDERR)
            os.close(descriptor)
        else:
            self.close()
            self._descriptor = descriptor
        return os.fstat(STDERR if self._is_stderr else descriptor).st_size

    def _rotate(self) -> None:
        """Begin an empty file; where files cannot be renamed, this one is emptied."""
        assert self._descriptor is not None
        names = rotated_paths(self.path, self._num_files)
        try:
            for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
                with contextlib.suppress(FileNotFoundError):
                    newer.replace(older)
        except OSError:
            names = names[:1]
        if len(names) == 1:
            os.ftruncate(self._descriptor, 0)
        self._open()


def rotated_paths(path: Path, num_files: int) -> Sequence[Path]:
    """The file and those it is renamed to, newest first."""
    return [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, num_files))]


def reopen_without_blocking(descriptor: int) -> None:
    """Have writes to a pipe or terminal fail where they would wait, for this process alone.

    Whoever shares the pipe (the shell, a parent) keeps an open file of its own, which waits as
    before. Nothing happens for files, which do not wait, nor for sockets, which cannot be opened
    again.
    """
    with contextlib.suppress(OSError):
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            return
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fresh = os.open(f"/proc/self/fd/{descriptor}", flags)
        os.dup2(fresh, descriptor)
        os.close(fresh)
