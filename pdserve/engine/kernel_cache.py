"""Compiled functions on disk, so that the next process need not compile them again.

    FOLDER/NAME-KEY.nbc = sha256 of the rest, 32 bytes | numba's form of the compiled function

numba's form is a pickle, which can run code when it is read. So it is read only from a folder that
is this user's and that nobody else can write to, and only if its digest fits: what a power cut or
a full disk left behind is dropped and compiled again. The key names all that the result depends
on, so a file is never changed, only replaced whole, and processes may compile side by side. Where
no file can be read or written, functions are compiled in memory and serve all the same.
"""

import functools
import hashlib
import importlib.metadata
import os
import pickle
import secrets
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog

DIGEST_BYTES = 32
NAME_CHARS = 60
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

log = structlog.get_logger(__name__)
_told: set[str] = set()


class CacheProblem(Exception):
    """Why compiled functions cannot be kept; the message names the folder."""


def use_cache(dispatcher: Any, stamp: str) -> Any:
    """Keep what `dispatcher` compiles on disk; returns it. `stamp` stands for its source.

    Also for the sources of functions that it calls: see `stamp_of`.
    """
    dispatcher._cache = KernelCache(dispatcher.py_func, stamp)
    return dispatcher


def stamp_of(paths: Iterable[Path]) -> str:
    """A digest of these files' content, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """NUMBA_CACHE_DIR/pdserve if that is set, else pdserve/kernels in the user's cache folder."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given).absolute() / "pdserve"
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(base) if base.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        raise CacheProblem("this user has no home folder; XDG_CACHE_HOME can name one") from None
    return home / "pdserve" / "kernels"


class KernelCache:
    """What numba's dispatcher asks for a function's compiled forms, one for each signature."""

    def __init__(self, function: Any, stamp: str) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"[-NAME_CHARS:]
        self._stamp = f"{stamp} {function.__module__} {function.__qualname__}"

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def enable(self) -> None:
        """It always is."""

    def disable(self) -> None:
        """numba asks for this nowhere."""

    def flush(self) -> None:
        """Nothing is held in memory."""

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled form, or None if there is none that can be used."""
        from numba.core.compiler import CompileResult

        target.refresh()
        name = self._file_name(signature, target.codegen())
        try:
            with _Folder() as folder:
                data = folder.read(name)
                if data is None:
                    return None
                try:
                    payload = pickle.loads(_checked(data))  # noqa: S301  this user wrote it
                    return CompileResult._rebuild(target, *payload)  # type: ignore[no-untyped-call]
                except Exception:  # noqa: BLE001  whatever is wrong with it, it can be made again
                    folder.remove(name)
                    _tell("kernel_cache.damaged", folder=str(folder.path))
        except (CacheProblem, OSError) as problem:
            _tell("kernel_cache.unreadable", why=_text(problem))
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled form for later processes; does nothing if that is not possible."""
        from numba.core.serialize import dumps

        if any(not lifted.can_cache for lifted in compiled.lifted):
            return
        if compiled.library.has_dynamic_globals:
            return  # it holds addresses of this process
        payload = dumps(compiled._reduce())  # type: ignore[no-untyped-call]
        try:
            with _Folder() as folder:
                folder.write(
                    self._file_name(signature, compiled.codegen), _digest(payload) + payload
                )
        except (CacheProblem, OSError) as problem:
            _tell("kernel_cache.unwritable", why=_text(problem))

    def _file_name(self, signature: Any, codegen: Any) -> str:
        parts = (self._stamp, _versions(), signature, codegen.magic_tuple())
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        return f"{self._name}-{key}.nbc".replace("<", "").replace(">", "")


class _Folder:
    """The cache's folder, opened once: whoever renames it meanwhile changes nothing."""

    def __init__(self) -> None:
        self.path = cache_folder()
        self._descriptor = -1

    def __enter__(self) -> "_Folder":
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags)
        found = os.fstat(self._descriptor)
        if found.st_uid != os.geteuid():
            self.__exit__()
            raise CacheProblem(f"{self.path} belongs to another user")
        if found.st_mode & OTHERS_MAY_WRITE:
            self.__exit__()
            raise CacheProblem(f"{self.path} can be written by others: chmod go-w it")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, name: str) -> bytes | None:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._descriptor)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """All of it under its name, or nothing."""
        begun = f"{name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(begun, flags, 0o600, dir_fd=self._descriptor)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            os.replace(begun, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            self.remove(begun)
            raise

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._descriptor)


@functools.cache
def _versions() -> tuple[str, ...]:
    return (sys.version, *map(importlib.metadata.version, ("numba", "llvmlite", "numpy")))


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()


def _checked(data: bytes) -> bytes:
    payload = data[DIGEST_BYTES:]
    if data[:DIGEST_BYTES] != _digest(payload):
        raise ValueError("the digest does not fit")
    return payload


def _text(problem: CacheProblem | OSError) -> str:
    if isinstance(problem, OSError):
        return f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    return str(problem)


def _tell(event: str, **fields: str) -> None:
    """Once a process, not once a function."""
    if event in _told:
        return
    _told.add(event)
    if structlog.is_configured():
        log.warning(event, **fields, advice="functions are compiled again")
        return
    # A command, whose standard output is its result.
    said = " ".join(f"{name}={value!r}" for name, value in fields.items())
    print(f"{event} {said}: functions are compiled again", file=sys.stderr)
