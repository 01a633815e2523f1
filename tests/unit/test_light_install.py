"""Router, planner, client and command line run without torch; what decides runs without gRPC."""

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

WITHOUT_GRPC = """
import importlib, pkgutil, sys
sys.modules["grpc"] = None  # importing it raises
rooms = ("pdserve.domain", "pdserve.config", "pdserve.observe", "pdserve.engine", "kvtransfer",
         "router", "prefill_worker", "decode_worker", "placement")
adapters = ("__main__", ".app", "router.grpc_api", "placement.probing")
for room in rooms:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        if not module.name.endswith(adapters):
            importlib.import_module(module.name)
importlib.import_module("pdserve.rpc.streams")
print("all imported")
"""


def imports(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    return result.stdout or result.stderr


def test_all_but_workers_import_without_torch() -> None:
    assert imports(WITHOUT_HEAVY) == "all imported\n"


def test_all_that_decides_imports_without_grpc() -> None:
    assert imports(WITHOUT_GRPC) == "all imported\n"
