"""Compiling a kernel with numba: cached on disk where that is possible, clear where it is not.

Kernels are plain functions over arrays. They are compiled at their first call; the result is kept
by `pdserve.engine.kernel_cache`, or, on a read-only disk, not at all.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from pdserve.domain import kv_demand, latency, pair_cost
from pdserve.domain.errors import LocalFault
from pdserve.engine.kernel_cache import stamp_of, use_cache

numba: Any
try:
    numba = importlib.import_module("numba")
except ImportError:  # the message comes at the first call: importing a module must stay possible
    numba = None

F = TypeVar("F", bound=Callable[..., Any])

MISSING = "the planner needs numba, which is not installed: pip install 'pdserve[planner]'"


SHARED = (kv_demand, latency, pair_cost)
"""Modules of plain functions that kernels make part of themselves."""


def content_of_kernels() -> str:
    """A digest of every source file of this package, and of what it compiles of others."""
    shared = [Path(str(module.__file__)) for module in SHARED]
    return stamp_of([*sorted(Path(__file__).parent.glob("*.py")), *shared])


STAMP = content_of_kernels() if numba is not None else ""

OPTIONS = {"error_model": "numpy"}
UNCOUNTED = {**OPTIONS, "_nrt": False}
"""Without numba's runtime: references to arrays are not counted. The atomic counting of each row
that is looked at took nine tenths of a run with 50 instances."""


def compiled(function: F) -> F:
    """Compile `function` for arrays and numbers; raises `LocalFault` when called without numba.

    It makes views of the arrays that it is given, but no arrays: see `compiled_allocating`.
    """
    return _compile(function, UNCOUNTED)


def compiled_allocating(function: F) -> F:
    """`compiled` for a function that makes arrays of its own, itself or in what is inlined."""
    return _compile(function, OPTIONS)


def _compile(function: F, options: dict[str, Any]) -> F:
    if numba is None:
        return cast(F, _refuse)
    return cast(F, use_cache(numba.njit(**options)(function), STAMP))


def inlined(function: F) -> F:
    """Make `function` part of each compiled function that calls it.

    For helpers with one caller: compiling them on their own costs as much as the caller itself.
    """
    if numba is None:
        return cast(F, _refuse)
    return cast(F, numba.njit(inline="always", **OPTIONS)(function))


def _refuse(*_: object) -> None:
    raise LocalFault(MISSING)
