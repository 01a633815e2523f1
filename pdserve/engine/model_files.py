"""What a Hugging Face model directory says before any weight is loaded; no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.config.override import NO_OVERRIDE, ModelOverride
from pdserve.domain.errors import LocalFault
from pdserve.engine.end_tokens import named_end_tokens
from pdserve.engine.json_files import read_json, read_json_if_there
from pdserve.engine.model_faults import (
    check_no_adapter,
    check_no_pointers,
    contents_hint,
    missing_weights,
    model_paths,
    path_hint,
    shards_of,
)
from pdserve.engine.model_numbers import check_numbers, end_token_ids
from pdserve.engine.model_override import max_context_tokens, override_bytes, with_override
from pdserve.engine.model_shape import check_decoder_only, first_int, text_config
from pdserve.models import DEMO_DRAFT_MODEL_DIR, DEMO_MODEL_DIR

_PACKAGED = {"demo": DEMO_MODEL_DIR, "demo-draft": DEMO_DRAFT_MODEL_DIR}
_MAX_FULLY_HASHED_BYTES = 64 * 2**20
_NUM_SAMPLED_PAGES = 256
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A checked model directory: weights in safetensors, and what config.json says of them."""

    name: str
    model_dir: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    model_hash: bytes
    override: ModelOverride = NO_OVERRIDE

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @classmethod
    def open(cls, model: str | Path, override: ModelOverride | None = None) -> "ModelFiles":
        """Check the directory of `model` (see `resolve_model_dir`); `LocalFault` says what fails.

        `config` and what follows from it are those with `override` in place of what the file says.
        Only safetensors are accepted: pickled weights can run code when they are loaded. Code in
        the directory is never run either.
        """
        model_dir = resolve_model_dir(str(model))
        override = override or NO_OVERRIDE
        path = model_dir / "config.json"
        check_no_pointers(model_paths(model_dir))
        check_no_adapter(model_dir)
        if not path.exists():
            hint = contents_hint(model_dir)
            raise LocalFault(f"cannot read {path}: No such file or directory; {hint}")
        original = read_json(path)
        check_decoder_only(original)
        check_numbers(text_config(original), path)
        config = with_override(original, override)
        weights = _find_weights(model_dir)
        sizes = text_config(config)
        context = max_context_tokens(config, override, original=original)
        vocab_size = first_int(sizes, "vocab_size")
        if context is None or vocab_size is None:
            missing = "context limit" if context is None else "vocab_size"
            raise LocalFault(f"{model_dir / 'config.json'} gives no {missing}")
        if not (model_dir / "tokenizer.json").is_file():
            raise LocalFault(f"{model_dir} has no tokenizer.json")
        return cls(
            name=str(model) if str(model) in _PACKAGED else model_dir.name,
            model_dir=model_dir,
            config=config,
            weights=weights,
            vocab_size=vocab_size,
            max_context_tokens=context,
            eos_token_ids=_eos_token_ids(model_dir, sizes, vocab_size),
            model_hash=_hash_model(model_dir / "config.json", weights, override_bytes(override)),
            override=override,
        )


def resolve_model_dir(name: str) -> Path:
    """`demo` and `demo-draft` are the packaged models; all else is a path to a directory."""
    model_dir = _PACKAGED.get(name, Path(name).expanduser())
    if not model_dir.is_dir():
        known = ", ".join(sorted(_PACKAGED))
        hint = path_hint(name, model_dir)
        raise LocalFault(f"no model directory at {model_dir} (packaged models: {known}){hint}")
    return model_dir.resolve()


def _eos_token_ids(model_dir: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """generation_config.json decides if it names end tokens, else config.json.

    The tokenizer's files may name more: many chat models end a turn with a token that only those
    name.
    """
    path = model_dir / "generation_config.json"
    generation = read_json_if_there(path)
    is_decided = generation.get("eos_token_id") not in (None, [])
    source, path = (generation, path) if is_decided else (config, model_dir / "config.json")
    decided = end_token_ids(
        source.get("eos_token_id"), vocab_size=vocab_size, field="eos_token_id", path=path
    )
    configured = config.get("eos_token_id")
    named = named_end_tokens(
        model_dir, configured if isinstance(configured, list) else [configured]
    )
    inside = [token_id for token_id in named if token_id < vocab_size]
    return tuple(dict.fromkeys([*decided, *inside]))


def _find_weights(model_dir: Path) -> tuple[Path, ...]:
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if index.exists():
        weights = shards_of(model_dir, read_json(index))
    elif single.exists():
        weights = (single,)
    else:
        raise missing_weights(model_dir)
    for path in weights:
        _check_safetensors(path)
    return weights


def _check_safetensors(path: Path) -> None:
    """Header readable and file complete; see the format section of the safetensors README."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes)) if header_bytes < size else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
    except OSError as error:
        raise LocalFault(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise LocalFault(f"{path} is not a safetensors file") from error
    if 8 + header_bytes + max(ends, default=0) != size:
        raise LocalFault(f"{path} is cut short or has bytes that belong to no tensor")


def _hash_model(config: Path, weights: tuple[Path, ...], override: bytes) -> bytes:
    """16 bytes that tell models apart.

    All bytes of config and weights up to 64 MiB a file; of larger files the size, the first MiB
    (the header) and 256 pages spread evenly, so that a 100 GB model is hashed in a second. A change
    confined to pages that are not sampled goes unseen.
    """
    digest = hashlib.blake2b(config.read_bytes() + override, digest_size=16)
    for path in weights:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= _MAX_FULLY_HASHED_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(2**20))
            for page in range(_NUM_SAMPLED_PAGES):
                file.seek((size - _PAGE_BYTES) * page // (_NUM_SAMPLED_PAGES - 1))
                digest.update(file.read(_PAGE_BYTES))
    return digest.digest()
