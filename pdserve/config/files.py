"""Writing result files: one place turns a disk that takes nothing into a message."""

from pathlib import Path

from pdserve.domain.errors import LocalFault


def write_file(path: Path, text: str) -> None:
    """Write `text` as UTF-8; raises `LocalFault` naming the file and what is wrong."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LocalFault(f"{path}: {error.strerror}") from None
