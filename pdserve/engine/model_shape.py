"""What config.json says of a model's kind and of its KV cache; no torch."""

from collections.abc import Mapping
from typing import Any

from pdserve.domain.errors import LocalFault
from pdserve.domain.layout import KvLayout, LayerKv

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
"""Names of the context limit, in the order in which they count."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_OWN_ATTENTION = "it computes attention itself, without the attention interface of transformers"
_OWN_STATE = "some of its layers keep state outside the KV cache"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        ("bloom", "mpt", "falcon", "gptj", "gpt_neo", "codegen", "xglm", "ctrl", "openai-gpt"),
        _OWN_ATTENTION,
    ),
    **dict.fromkeys(
        (
            *("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "jamba", "bamba", "zamba"),
            *("zamba2", "nemotron_h", "falcon_h1", "recurrent_gemma", "qwen3_next", "qwen3_5"),
            *("qwen3_5_moe", "granitemoehybrid", "lfm2", "lfm2_moe", "kimi_linear", "minimax"),
        ),
        _OWN_STATE,
    ),
}
_ENCODERS = frozenset(
    (
        *("albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta"),
        *("deberta-v2", "distilbert", "electra", "ernie", "esm", "flaubert", "funnel", "ibert"),
        *("layoutlm", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet"),
        *("mra", "nomic_bert", "nystromformer", "rembert", "roberta", "roberta-prelayernorm"),
        *("roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso"),
    )
)
_ENCODER_DECODERS = frozenset(
    (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "led"),
        *("longt5", "m2m_100", "marian", "mbart", "moonshine", "mt5", "mvp", "nllb-moe", "pegasus"),
        *("pegasus_x", "plbart", "prophetnet", "speech_to_text", "switch_transformers", "t5"),
        *("t5gemma", "udop", "umt5", "whisper"),
    )
)
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model, where a config describes several models."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def first_int(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of `keys` that holds a number; families name the same size differently."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def check_decoder_only(config: Mapping[str, Any]) -> None:
    """Raise `LocalFault` for a model that cannot be served, as far as its config tells."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise LocalFault("config.json names no model_type")
    if config.get("is_encoder_decoder", kind in _ENCODER_DECODERS):
        raise LocalFault(f"model type {kind} is an encoder-decoder; only decoders are served")
    names = [str(name) for name in config.get("architectures") or ()]
    if names and not any(name.endswith(_GENERATING) for name in names):
        raise LocalFault(f"model type {kind} ({names[0]}) does not generate text")
    if kind in _ENCODERS and not config.get("is_decoder"):
        raise LocalFault(f"model type {kind} is an encoder; it does not generate text")
    if kind in UNSUPPORTED:
        raise LocalFault(f"model type {kind} is not supported: {UNSUPPORTED[kind]}")


def kv_layout(config: Mapping[str, Any], *, block_size: int, dtype: str) -> KvLayout:
    """Layout of the KV cache, from config.json alone.

    Covers multi-head, grouped and multi-query attention with one shape for all layers, and MLA as
    transformers runs it (expanded: every head has its own K and V). `TorchEngine` does not rely on
    this; it asks the model.
    """
    sizes = text_config(config)
    num_layers = first_int(sizes, "num_hidden_layers", "n_layer", "num_layers")
    num_heads = first_int(sizes, "num_attention_heads", "n_head", "num_heads")
    hidden = first_int(sizes, "hidden_size", "n_embd", "d_model")
    if num_layers is None or num_heads is None or hidden is None:
        raise LocalFault("config.json does not give layers, heads and hidden size")
    if "kv_lora_rank" in sizes:
        k_head_dim = int(sizes["qk_nope_head_dim"]) + int(sizes["qk_rope_head_dim"])
        layer = LayerKv(num_heads, k_head_dim, int(sizes["v_head_dim"]))
    else:
        num_kv_heads = first_int(sizes, "num_key_value_heads", "num_kv_heads") or num_heads
        if sizes.get("multi_query"):
            num_kv_heads = 1
        head_dim = first_int(sizes, "head_dim") or hidden // num_heads
        layer = LayerKv(num_kv_heads, head_dim, head_dim)
    return KvLayout(
        layers=(layer,) * num_layers,
        block_size=block_size,
        dtype=dtype,
        item_bytes=item_bytes(dtype),
    )


def item_bytes(dtype: str) -> int:
    if dtype not in ITEM_BYTES:
        raise LocalFault(f"dtype must be one of {', '.join(ITEM_BYTES)}; got {dtype}")
    return ITEM_BYTES[dtype]
