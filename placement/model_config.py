"""From a Hugging Face `config.json` to a `ModelSpec`, and the catalogue of well-known models."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pdserve.domain.errors import LocalFault
from placement.model_spec import (
    Experts,
    LatentAttention,
    LinearAttention,
    ModelSpec,
    Precision,
)

Config = Mapping[str, Any]

# Bytes a value with its scales: fp8 per tensor or 128x128 block; int4 and mxfp4 in groups.
WEIGHT_BYTES = {
    "bf16": 2.0,
    "fp8": 1.0 + 4 / (128 * 128),
    "int8": 1.0 + 2 / 128,
    "int4": 0.5 + 2.5 / 128,  # group 128: fp16 scale and a 4-bit zero point
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
COMPUTE = {"fp8": "fp8", "nvfp4": "fp4"}  # the rest are unpacked and multiplied in bfloat16
KV_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0}
DENSE_MLP_WITHOUT_GATE = {"opt", "gpt2", "gpt_neox", "bloom", "falcon", "starcoder2"}
QKV_BIAS = {"qwen2", "qwen2_moe", "opt", "gpt2", "bloom", "gpt_neox"}


def load_model(name: str | Path) -> ModelSpec:
    """A path to a `config.json` or its directory, else a name of the catalogue.

    Raises `LocalFault` naming what is missing, or the nearest names for an unknown one.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return read_config_file(path)
    return catalogue_model(str(name))


def read_config_file(path: Path) -> ModelSpec:
    """Parse a `config.json`; raises `LocalFault` with the reason."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LocalFault(f"{path}: not a readable config.json: {error}") from None
    if not isinstance(config, dict):
        raise LocalFault(f"{path}: expected a JSON object, got {type(config).__name__}")
    name = config.get("_name_or_path") or path.parent.name or str(path)
    return parse_config(config, name=str(name), source=str(path))


@cache
def catalogue() -> Mapping[str, Config]:
    """Configs by Hugging Face name, with their `source`."""
    text = (resources.files("placement") / "data" / "models.json").read_text(encoding="utf-8")
    models: dict[str, Config] = json.loads(text)["models"]
    return models


def catalogue_model(name: str) -> ModelSpec:
    """Look a model up by name, letter case and organisation optional."""
    known = catalogue()
    short = {key.split("/")[-1].lower(): key for key in known}
    exact = {key.lower(): key for key in known}
    key = exact.get(name.lower()) or short.get(name.split("/")[-1].lower())
    if key is None:
        close = difflib.get_close_matches(name.split("/")[-1].lower(), short, n=3, cutoff=0.4)
        hint = ", ".join(short[match] for match in close) or "none is close"
        raise LocalFault(
            f"model {name!r} is neither a config.json nor in the catalogue; nearest: {hint}"
        )
    entry = known[key]
    if "alias" in entry:
        entry = known[entry["alias"]]
    return parse_config(entry["config"], name=key, source=f"catalogue entry {key}")


def parse_config(config: Config, *, name: str, source: str) -> ModelSpec:
    """Read the fields that sizes depend on; raises `LocalFault` naming missing ones."""
    outer = config
    config = config.get("text_config", config)
    reader = _Reader(config, source)
    kind = str(config.get("model_type", outer.get("model_type", "")))
    num_layers = reader.integer("num_hidden_layers", "n_layer", "n_layers")
    hidden = reader.integer("hidden_size", "n_embd", "d_model")
    heads = reader.integer("num_attention_heads", "n_head", "n_heads")
    experts = _experts(reader, num_layers)
    gated = kind not in DENSE_MLP_WITHOUT_GATE
    dense_width = reader.optional(
        "intermediate_size", "ffn_dim", "n_inner", "dense_intermediate_size"
    )
    if dense_width is None:
        dense_width = 4 * hidden if not gated else (0 if experts else None)
    if dense_width is None:
        raise LocalFault(f"{source}: intermediate_size is missing")
    spec = ModelSpec(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden,
        vocab_size=reader.integer("vocab_size"),
        num_heads=heads,
        num_kv_heads=_kv_heads(reader, kind, heads),
        head_dim=reader.optional("head_dim") or hidden // heads,
        intermediate_size=dense_width,
        max_position=reader.optional("max_position_embeddings", "n_positions") or 0,
        gated_mlp=gated,
        tied_embeddings=bool(
            config.get("tie_word_embeddings", outer.get("tie_word_embeddings", kind == "opt"))
        ),
        attention_bias=bool(config.get("attention_bias", kind in QKV_BIAS)),
        mlp_bias=bool(config.get("mlp_bias", not gated)),
        learned_positions=_learned_positions(reader, kind),
        sliding_window=_window(config),
        num_sliding_layers=_num_sliding(config, kind, num_layers),
        latent=_latent(reader),
        linear=_linear(reader),
        experts=experts,
        attention_gate=bool(config.get("attn_output_gate", False)),
    )
    return spec.with_precision(_config_precision(outer, config))


def with_quantisation(
    spec: ModelSpec, *, weights: str | None = None, kv: str | None = None
) -> ModelSpec:
    """The same model with other storage; what is left out stays as it is.

    `weights` is bf16, fp8, int8, int4, mxfp4 or nvfp4. int4 and mxfp4 apply to the experts alone
    where there are any (as in Kimi-K2 and gpt-oss).
    """
    for field, given, known in (("weights", weights, WEIGHT_BYTES), ("kv", kv, KV_BYTES)):
        if given not in (None, *known):
            raise LocalFault(f"{field}: unknown precision {given!r}; known: {', '.join(known)}")
    precision = spec.precision
    if kv is not None:
        precision = replace(precision, kv_bytes=KV_BYTES[kv])
    if weights is not None:
        experts_only = spec.experts is not None and weights in ("int4", "mxfp4")
        linear = "bf16" if experts_only else weights
        precision = _with_weights(precision, linear, weights)
    return spec.with_precision(precision)


def _with_weights(precision: Precision, linear: str, experts: str) -> Precision:
    return replace(
        precision,
        linear_bytes=WEIGHT_BYTES[linear],
        expert_bytes=WEIGHT_BYTES[experts],
        linear_compute=COMPUTE.get(linear, "bfloat16"),
        expert_compute=COMPUTE.get(experts, "bfloat16"),
    )


class _Reader:
    """Integer fields under any of several names."""

    def __init__(self, config: Config, source: str) -> None:
        self.config = config
        self.source = source

    def optional(self, *names: str) -> int | None:
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise LocalFault(f"{self.source}: {name} must be a whole number, got {value!r}")
            return value
        return None

    def integer(self, *names: str) -> int:
        value = self.optional(*names)
        if not value:
            others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            raise LocalFault(f"{self.source}: {names[0]}{others} is missing")
        return value


def _kv_heads(reader: _Reader, kind: str, heads: int) -> int:
    if kind == "falcon" and reader.config.get("multi_query"):
        return 1
    return reader.optional("num_key_value_heads", "num_kv_heads") or heads


def _learned_positions(reader: _Reader, kind: str) -> int:
    if kind == "opt":  # OPT's table has two rows more than positions
        return reader.integer("max_position_embeddings") + 2
    return reader.optional("n_positions", "max_position_embeddings") or 0 if kind == "gpt2" else 0


def _window(config: Config) -> int | None:
    if config.get("use_sliding_window") is False:
        return None
    window = config.get("sliding_window")
    return window if isinstance(window, int) else None


def _num_sliding(config: Config, kind: str, num_layers: int) -> int:
    if _window(config) is None:
        return 0
    layer_types = config.get("layer_types")
    if layer_types:
        return sum(layer == "sliding_attention" for layer in layer_types)
    if kind in ("gemma2", "gpt_oss"):
        return num_layers // 2
    if kind.startswith("gemma3"):
        return num_layers - num_layers // int(config.get("sliding_window_pattern", 6))
    if config.get("use_sliding_window"):
        return max(0, num_layers - int(config.get("max_window_layers", 0)))
    return num_layers


def _latent(reader: _Reader) -> LatentAttention | None:
    if not reader.optional("kv_lora_rank"):
        return None
    return LatentAttention(
        q_lora_rank=reader.optional("q_lora_rank") or 0,
        kv_lora_rank=reader.integer("kv_lora_rank"),
        nope_head_dim=reader.integer("qk_nope_head_dim"),
        rope_head_dim=reader.integer("qk_rope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
    )


def _linear(reader: _Reader) -> LinearAttention | None:
    layer_types = reader.config.get("layer_types") or ()
    num_layers = sum(layer == "linear_attention" for layer in layer_types)
    if not num_layers:
        return None
    return LinearAttention(
        num_layers=num_layers,
        num_key_heads=reader.integer("linear_num_key_heads"),
        num_value_heads=reader.integer("linear_num_value_heads"),
        key_head_dim=reader.integer("linear_key_head_dim"),
        value_head_dim=reader.integer("linear_value_head_dim"),
    )


def _experts(reader: _Reader, num_layers: int) -> Experts | None:
    count = reader.optional("n_routed_experts", "num_local_experts", "num_experts")
    if not count:
        return None
    width = reader.optional("moe_intermediate_size") or reader.integer("intermediate_size")
    shared = reader.optional("shared_expert_intermediate_size", "shared_intermediate_size")
    if shared is None:
        shared = width * (reader.optional("n_shared_experts") or 0)
    return Experts(
        num_experts=count,
        experts_per_token=reader.integer("num_experts_per_tok", "moe_topk"),
        intermediate_size=width,
        shared_intermediate_size=shared,
        num_dense_layers=_num_dense(reader, num_layers),
    )


def _num_dense(reader: _Reader, num_layers: int) -> int:
    listed = reader.config.get("mlp_only_layers") or []
    every = reader.optional("decoder_sparse_step") or 1
    skipped = num_layers - num_layers // every
    return max(reader.optional("first_k_dense_replace") or 0, len(listed), skipped)


def _config_precision(outer: Config, config: Config) -> Precision:
    quant = outer.get("quantization_config") or config.get("quantization_config") or {}
    method = str(quant.get("quant_method", quant.get("quant_algo", ""))).lower()
    bits = quant.get("bits") or quant.get("w_bit") or _compressed_bits(quant)
    weights = _weight_kind(method, bits)
    kv = "fp8" if "fp8" in str(quant.get("kv_cache_quant_algo", "")).lower() else "bf16"
    has_experts = any(config.get(name) for name in ("num_local_experts", "n_routed_experts"))
    linear = "bf16" if weights == "mxfp4" and has_experts else weights
    if method in ("compressed-tensors", "compressed_tensors") and weights == "int4" and has_experts:
        linear = "bf16"
    return _with_weights(Precision(kv_bytes=KV_BYTES[kv]), linear, weights)


def _compressed_bits(quant: Config) -> int | None:
    for group in (quant.get("config_groups") or {}).values():
        bits = (group.get("weights") or {}).get("num_bits")
        if isinstance(bits, int):
            return bits
    return None


def _weight_kind(method: str, bits: object) -> str:
    if not method:
        return "bf16"
    if "nvfp4" in method:
        return "nvfp4"
    if "mxfp4" in method:
        return "mxfp4"
    if "fp8" in method or (bits == 8 and "compressed" in method):
        return "fp8"
    if bits == 8 or "w8" in method or "int8" in method:
        return "int8"
    if bits == 4 or method in ("awq", "gptq", "awq_marlin", "gptq_marlin"):
        return "int4"
    raise LocalFault(f"quantization method {method!r} with {bits!r} bits is not known here")
