"""Writing rendered files: all of them into one folder, never over somebody's own."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from pdserve.domain.errors import LocalFault

MARK = ".rendered-by-pdserve"
"""A folder with this file is ours to replace."""


def write_files(folder: Path, files: Mapping[str, str], *, overwrite: bool) -> None:
    """Write `files` (relative path to text); what an earlier rendering left is removed first.

    Raises `LocalFault` for a folder that holds something else, or cannot be written.
    """
    try:
        _make_room(folder, overwrite=overwrite)
        for name, text in {**files, MARK: ""}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LocalFault(f"{error.filename or folder}: {error.strerror}") from None


def _make_room(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise LocalFault(f"{folder} is a file; -o names a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise LocalFault(f"{folder} is not empty; --overwrite replaces an earlier rendering")
    if not (folder / MARK).exists():
        raise LocalFault(f"{folder} holds files that pdserve did not render: choose another folder")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
