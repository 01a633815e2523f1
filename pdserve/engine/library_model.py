"""What the library makes of a model directory, and what it says only in passing made an error."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import structlog

from pdserve.config.override import is_by_layer_type
from pdserve.domain.errors import LocalFault
from pdserve.engine.model_files import ModelFiles

log = structlog.get_logger(__name__)

_IN_A_LAYER = re.compile(r"\.\d+\.")
_NEVER_NEEDED = ("inv_freq", "masked_bias", ".attn.bias", ".attention.bias")  # of old checkpoints


def library_config(files: ModelFiles) -> Any:
    """The library's config of the model, with the override; `LocalFault` if it has none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = files.model_type
    if kind not in transformers.CONFIG_MAPPING:
        own_code = ", and code in its directory is never run" if "auto_map" in files.config else ""
        reason = f"transformers {transformers.__version__} does not know this type{own_code}"
        raise _unloadable(files, reason)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _unloadable(files, "it has no class that generates text from text alone")
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(files.config)))
    except Exception as error:  # any check of the library's
        raise _unloadable(files, "config.json does not fit this type") from error
    _check_takes_override(files, config)
    return config


def load_fault(files: ModelFiles, error: Exception) -> LocalFault:
    """For an error of the library's loading; the log has its text."""
    log.error("model.not_loaded", model_dir=str(files.model_dir), exc_info=error)
    if isinstance(error, ImportError):
        return _unloadable(files, f"it needs a package that is not installed: {error.name}")
    if isinstance(error, MemoryError):
        return _unloadable(files, "there is not enough memory for its weights")
    return _unloadable(files, f"config.json and weights do not fit ({type(error).__name__})")


def check_loaded(files: ModelFiles, model: Any, loading: Mapping[str, Any]) -> None:
    """Raise `LocalFault` if not every weight has its place, or a place has no weight."""
    if missing := sorted(loading["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LocalFault(f"{files.model_dir} lacks weights of the model: {missing[0]}{others}")
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise LocalFault(
            f"{files.model_dir}: {name} is {_shape(found)} in the weights, and {_shape(wanted)} by "
            "config.json"
        )
    modules = {name for name, _ in model.named_modules()}
    strange = sorted(name for name in loading["unexpected_keys"] if _has_place(name, modules))
    if strange:
        others = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise LocalFault(
            f"{files.model_dir} has weights that model type {files.model_type} does not use: "
            f"{strange[0]}{others}; without them its text would be another"
        )
    _check_factors(files, model)
    _check_uses_override(files, model)


def _has_place(name: str, modules: set[str]) -> bool:
    """It belongs into a layer that the model has; towers and further heads are left out."""
    if name.endswith(_NEVER_NEEDED) or not (inside := _IN_A_LAYER.search(name)):
        return False
    return name[: inside.end() - 1] in modules


def _check_factors(files: ModelFiles, model: Any) -> None:
    """LongRoPE's lists have a number for each frequency; the library would repeat a single one."""
    buffers = model.named_buffers()
    sizes = sorted({buffer.numel() for name, buffer in buffers if name.endswith("inv_freq")})
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for part in rope.values() if is_by_layer_type(rope) else (rope,):
        for name in ("short_factor", "long_factor"):
            num_factors = len(part.get(name) or ())
            if num_factors and sizes and num_factors not in sizes:
                raise LocalFault(
                    f"{files.model_dir}: {name} has {num_factors} numbers; the model's positions "
                    f"have {' or '.join(map(str, sizes))}"
                )


def _check_takes_override(files: ModelFiles, config: Any) -> None:
    if files.override.rope_parameters is None:
        return
    if not hasattr(type(config.get_text_config()), "rope_parameters"):
        raise _no_rope(files)


def _check_uses_override(files: ModelFiles, model: Any) -> None:
    """The model's own code may know one way to turn positions only, and say nothing."""
    given = files.override.rope_parameters
    if given is None:
        return
    wanted = (
        {rope["rope_type"] for rope in given.values()}
        if is_by_layer_type(given)
        else {given["rope_type"]}
    )
    used: set[object] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        used.update(kind.values() if isinstance(kind, dict) else (kind,))
    if not wanted <= used:
        raise _no_rope(files)


def _no_rope(files: ModelFiles) -> LocalFault:
    return LocalFault(
        f"override_config.rope_parameters: model type {files.model_type} does not use them"
    )


def _unloadable(files: ModelFiles, reason: str) -> LocalFault:
    return LocalFault(
        f"transformers cannot load {files.model_dir} (model type {files.model_type}): {reason}"
    )


def _shape(sizes: Any) -> str:
    return " x ".join(str(int(size)) for size in sizes)
