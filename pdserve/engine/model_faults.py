"""What is in a directory instead of a model that can be served, said in one line; no torch."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pdserve.domain.errors import LocalFault
from pdserve.engine.model_shape import text_config

_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_NAMED = 3
_MAX_NAME_CHARS = 40

_OTHER_FORMATS = {  # by file names: what has no safetensors but one of these
    "*.gguf": "GGUF files, which are llama.cpp's: use the checkpoint that they were made from",
    "*.bin": "pickled weights only, and those can run code: save them as safetensors",
    "*.pt": "pickled weights only, and those can run code: save them as safetensors",
    "*.pth": "pickled weights only, and those can run code: save them as safetensors",
    "*.ckpt": "pickled weights only, and those can run code: save them as safetensors",
    "*.h5": "TensorFlow's weights: save them as safetensors",
    "*.msgpack": "Flax's weights: save them as safetensors",
    "*.onnx": "ONNX files: use the checkpoint that they were made from",
    "consolidated*.safetensors": "weights in the maker's own format: use the one of transformers",
    "adapter_model.safetensors": "an adapter's weights: merge them into their base model",
    "*.incomplete": "parts of a download that did not end: download it again",
}
_QUANTISED_DTYPES = ("F8", "F6", "F4")
_QUANTISED_NAMES = (
    *(".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".weight_format", ".SCB", ".absmax", "_blocks", ".quant_state.bitsandbytes__nf4"),
)


def check_no_pointers(paths: Iterable[Path]) -> None:
    """Raise `LocalFault` if git-lfs left its pointers in place of the files."""
    pointers = [path for path in paths if _is_pointer(path)]
    if not pointers:
        return
    many = f"{_named([path.name for path in pointers])} " + ("is" if len(pointers) == 1 else "are")
    what = "a git-lfs pointer" if len(pointers) == 1 else "git-lfs pointers"
    folder = pointers[0].parent
    raise LocalFault(
        f"{folder}: {many} {what}, not the real thing: run `git lfs pull` there, or download again"
    )


def model_paths(model_dir: Path) -> list[Path]:
    """Files of a model directory that are read."""
    return sorted([*model_dir.glob("*.json"), *model_dir.glob("*.safetensors")])


def check_no_adapter(model_dir: Path) -> None:
    """Raise `LocalFault` for a folder with an adapter, which the library would apply unasked."""
    path = model_dir / "adapter_config.json"
    if not path.exists():
        return
    try:
        base = json.loads(path.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    of = f" of {_short(base)}" if isinstance(base, str) and base else ""
    raise LocalFault(
        f"{model_dir} holds an adapter{of} (adapter_config.json): adapters are not served; "
        "merge it into its base model and save that"
    )


def path_hint(name: str, path: Path) -> str:
    """Why `name` is no directory, where that can be told."""
    if path.suffix == ".gguf":
        return f": GGUF is llama.cpp's format, use {_OTHER_FORMATS['*.gguf'].partition('use ')[2]}"
    if path.exists():
        return ": it is a file; give the directory that holds it"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return ": nothing is downloaded here; `hf download` fetches a model of the Hugging Face Hub"
    return ""


def contents_hint(model_dir: Path) -> str:
    """What a directory without config.json has, as the end of a sentence."""
    names = sorted(path.name for path in model_dir.iterdir() if not path.name.startswith("."))
    if not names:
        return "the directory is empty"
    if "model_index.json" in names:
        return "it holds a diffusers pipeline, which makes no text"
    if "params.json" in names:
        return "it holds a model in its maker's own format: use the one of transformers"
    if any(name.endswith(".gguf") for name in names):
        return f"it holds {_OTHER_FORMATS['*.gguf']}"
    return f"it holds {_named(names)}"


def missing_weights(model_dir: Path) -> LocalFault:
    """For a directory without model.safetensors."""
    for pattern, what in _OTHER_FORMATS.items():
        if any(model_dir.glob(pattern)):
            return LocalFault(f"{model_dir} has no model.safetensors: it has {what}")
    if shards := sorted(path.name for path in model_dir.glob("*.safetensors")):
        return LocalFault(
            f"{model_dir} has no model.safetensors: it has {_named(shards)}, but no "
            "model.safetensors.index.json to say what is in which"
        )
    return LocalFault(f"{model_dir} has no model.safetensors")


def shards_of(model_dir: Path, index: Mapping[str, Any]) -> tuple[Path, ...]:
    """Files that a weight index names; `LocalFault` if it is none, or if some are missing."""
    name = "model.safetensors.index.json"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LocalFault(f"{model_dir / name} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    if strange := [shard for shard in shards if Path(shard).name != shard]:
        raise LocalFault(
            f"{model_dir / name} names a file outside its directory: {_short(strange[0])}"
        )
    missing = [shard for shard in shards if not (model_dir / shard).exists()]
    if missing:
        raise LocalFault(
            f"cannot read {model_dir / missing[0]}: No such file or directory; {name} names "
            f"{len(shards)} files, of which {len(missing)} are missing: download the model again"
        )
    return tuple(model_dir / shard for shard in shards)


def check_not_quantised(
    model_dir: Path, config: Mapping[str, Any], weights: Iterable[Path]
) -> None:
    """Raise `LocalFault` for weights that are not plain floating point numbers."""
    method = _quantised_by(model_dir, config) or _quantised_in(weights)
    if method is not None:
        raise LocalFault(
            f"{model_dir} is quantised ({method}): only float32, bfloat16 and float16 weights are "
            "computed with; use the checkpoint that it was made from"
        )


def _quantised_by(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    for part in (config, text_config(config)):
        for name in ("quantization_config", "compression_config"):
            if isinstance(told := part.get(name), Mapping):
                return _method(told)
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if (path := model_dir / name).exists():
            try:
                told = json.loads(path.read_bytes())
            except (OSError, ValueError):
                told = {}
            return f"{_method(told if isinstance(told, dict) else {})}, {name}"
    return None


def _method(told: Mapping[str, Any]) -> str:
    inner = told.get("quantization")
    told = inner if isinstance(inner, Mapping) else told
    for key in ("quant_method", "quant_algo", "format", "version"):
        if isinstance(value := told.get(key), str) and value:
            bits = told.get("bits", told.get("w_bit"))
            return _short(value) + (f", {bits} bits" if isinstance(bits, int) else "")
    flags = [bits for bits in ("4bit", "8bit") if told.get(f"load_in_{bits}") is True]
    return f"bitsandbytes, {flags[0]}" if flags else "a method that its config does not name"


def _quantised_in(weights: Iterable[Path]) -> str | None:
    for path in weights:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            dtype = entry.get("dtype", "")
            if dtype.startswith(_QUANTISED_DTYPES) or name.endswith(_QUANTISED_NAMES):
                return f"{_short(name)} of {path.name} is {dtype}"
    return None


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False  # whoever needs it says why it cannot be read


def _named(names: list[str]) -> str:
    shown = ", ".join(_short(name) for name in names[:_MAX_NAMED])
    num_more = len(names) - _MAX_NAMED
    return f"{shown} and {num_more} more" if num_more > 0 else shown


def _short(name: str) -> str:
    printable = "".join(char if char.isprintable() else "?" for char in name)
    return printable if len(printable) <= _MAX_NAME_CHARS else f"{printable[:_MAX_NAME_CHARS]}..."
