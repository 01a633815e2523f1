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
    from pdserve.client.values import Answer, Chunk, Model, Sampling
    from pdserve.domain.tokens import Finished, Usage

_MODULES = {
    "AdminClient": "pdserve.client.admin",
    "InferenceClient": "pdserve.client.inference",
    "Finished": "pdserve.domain.tokens",
    "Usage": "pdserve.domain.tokens",
}  # the others are in `pdserve.client.values`

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
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "pdserve.client.values")
    return getattr(importlib.import_module(module), name)
