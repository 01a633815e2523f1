"""Kernels say what is missing; for where they are kept see `tests/unit/engine`."""

import subprocess
import sys

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


def test_without_numba_a_call_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True
    )
    assert "pip install 'pdserve[planner]'" in done.stdout
