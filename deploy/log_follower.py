"""Reading a log file while its process writes and rotates it."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


class LogFollower:
    """Reads what is appended to a log file, from its beginning, through its rotations.

    Whoever makes it closes it. More than one rotation between two reads loses lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def read(self, max_bytes: int) -> bytes:
        """What is new, `max_bytes` at most; empty if nothing is, or the file cannot be read."""
        with contextlib.suppress(OSError):
            while True:
                if self._file is None:
                    self._file = self._path.open("rb")
                is_current = self._is_current(self._file)
                self._rewind_if_emptied(self._file)
                if chunk := self._file.read(max_bytes):
                    return chunk
                if is_current:
                    break
                self.close()  # the rest of what was renamed has been read
        return b""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_current(self, file: BinaryIO) -> bool:
        """Whether the name still stands for the file that is open; asked before it is read."""
        mine = os.fstat(file.fileno())
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return True  # between two names: the next read looks again
        return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)

    def _rewind_if_emptied(self, file: BinaryIO) -> None:
        if os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)
