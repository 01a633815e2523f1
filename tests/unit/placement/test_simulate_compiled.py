"""Kernels compile with a cache that follows their content, without one, or say what is missing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

from placement.simulation import compiled as module

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from pdserve.domain.errors import LocalFault
from placement.simulate import Simulator  # importing must stay possible
from placement.simulation.compiled import compiled
try:
    compiled(lambda: 1)()
except LocalFault as error:
    print(error)
"""


def double(number: int) -> int:
    return 2 * number


def test_without_numba_a_call_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True
    )
    assert "pip install 'pdserve[planner]'" in done.stdout


def test_without_a_folder_for_the_cache_kernels_compile_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "enable_caching", refuse)
    assert module.compiled(double)(4) == 8


def test_the_cache_is_keyed_by_the_content_of_all_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "compiled.py").write_text("")
    (tmp_path / "kernel.py").write_text("STEP = 1\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "compiled.py"))
    before = module.content_of_kernels()
    assert before == module.content_of_kernels()
    (tmp_path / "kernel.py").write_text("STEP = 2\n")
    assert module.content_of_kernels() != before
    dispatcher: Any = numba.njit(double)
    dispatcher.enable_caching()
    # What `compiled` relies on inside numba; without it kernels would not be cached.
    assert hasattr(dispatcher._cache._cache_file, "_source_stamp")
