"""Modules of the library without their weights."""

import copy
import threading
from typing import Any

import torch

_BUILDING = threading.Lock()  # the library's switches are of the whole process


def build_empty(config: Any, dtype: torch.dtype) -> Any:
    """The model of `config`, in evaluation mode: its parameters are memory nobody has touched.

    What modules compute for themselves, as the frequencies of their positions, is there.
    """
    import transformers
    from transformers.initialization import no_init_weights

    loader: Any = transformers.AutoModelForCausalLM
    with _BUILDING, no_init_weights():
        model = loader.from_config(copy.deepcopy(config), dtype=dtype)
    return model.requires_grad_(False).eval()


def build_random(config: Any) -> Any:
    """The model of `config` in float32 as the library makes it for training, in evaluation mode."""
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    with _BUILDING:
        model = loader.from_config(copy.deepcopy(config), dtype=torch.float32)
    return model.requires_grad_(False).eval()
