"""Router, planner, client and command line run where torch is not installed."""

import subprocess
import sys

WITHOUT_HEAVY = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "numba", "safetensors"):
    sys.modules[name] = None  # importing it raises
rooms = ("pdserve.cli", "pdserve.client", "pdserve.config", "pdserve.domain", "pdserve.rpc",
         "pdserve.observe", "router", "placement", "deploy")
for room in rooms:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print("all imported")
"""


def test_all_but_workers_import_without_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEAVY], capture_output=True, text=True, check=False
    )
    assert result.stdout == "all imported\n", result.stderr
