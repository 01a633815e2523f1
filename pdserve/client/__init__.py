"""The client of the public service, and load generators on top of it.

    async with InferenceClient("127.0.0.1:7450") as client:
        async for chunk in client.generate("def read_lines(path):"):
            print(chunk.text, end="")

Names are loaded when first used, so that importing this package imports no grpc.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdserve.client.admin import AdminClient
    from pdserve.client.inference import InferenceClient
    from pdserve.client.values import Answer, Chunk, Finished, Model, Sampling, Usage

_MODULES = {
    "AdminClient": "admin",
    "InferenceClient": "inference",
    "Answer": "values",
    "Chunk": "values",
    "Finished": "values",
    "Model": "values",
    "Sampling": "values",
    "Usage": "values",
}

__all__ = [
    "AdminClient",
    "Answer",
    "Chunk",
    "Finished",
    "InferenceClient",
    "Model",
    "Sampling",
    "Usage",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
