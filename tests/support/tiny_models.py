"""Tiny random models of many architectures, built from their configs; nothing is downloaded."""

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers

from pdserve.models import DEMO_MODEL_DIR

torch.set_num_threads(1)  # a second one waits for the first, for ages on a busy machine

_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MOE: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
_GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 256,
    "vocab_size": 160,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOWS: dict[str, Any] = {"sliding_window": 12, "layer_types": _ALTERNATING}

SWITCH = 32  # LongRoPE's frequencies change for requests of more tokens
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * place for place in range(8)],
    "long_factor": [2.0 + 0.9 * place for place in range(8)],
    "original_max_position_embeddings": SWITCH,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

SERVED: dict[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2/sliding": {"use_sliding_window": True, "max_window_layers": 0, **_WINDOWS},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 12},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        **_WINDOWS,
    },
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOWS},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        **_WINDOWS,
    },
    "phi": {},
    "phi3": {"sliding_window": 12},
    "mixtral": _MOE,
    "qwen2_moe": {**_MOE, "decoder_sparse_step": 1},
    "qwen3_moe": {**_MOE, "head_dim": 16},
    "phimoe": _MOE,
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "granitemoe": {**_MOE, "attention_multiplier": 0.3},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "olmoe": _MOE,
    "gpt2": _GPT2,
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "biogpt": {},
    "starcoder2": {"sliding_window": 12},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, **_WINDOWS},
    "stablelm": {},
    "smollm3": {},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {**_MLA, "num_key_value_heads": 2, "head_dim": 16},
    "exaone4": {"sliding_window": 12},
    "nemotron": {},
    "seed_oss": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "minimax_m2": {**_MOE, "head_dim": 16, "rotary_dim": 8},
    "gpt_oss": {**_MOE, "head_dim": 16, **_WINDOWS},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "persimmon": {},
    "arcee": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama4_text": {
        **_MOE,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": 12,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
    },
}

ROPES: dict[str, Mapping[str, Any]] = {
    "llama/linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama/dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "llama/yarn": {"rope_parameters": _YARN},
    "llama/llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": SWITCH,
        }
    },
    "llama/longrope": {"rope_parameters": _LONGROPE},
    "stablelm/partial": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}
    },
    "phi/partial-yarn": {"rope_parameters": {**_YARN, "partial_rotary_factor": 0.5}},
    "deepseek_v3/yarn": {
        **_MLA,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 8},
    },
    "gpt_oss/yarn": {
        **_MOE,
        "head_dim": 16,
        **_WINDOWS,
        "rope_parameters": {**_YARN, "truncate": False},
    },
    "phi3/longrope": {
        "original_max_position_embeddings": SWITCH,
        "rope_parameters": _LONGROPE,
    },
    "phimoe/longrope": {
        **_MOE,
        "original_max_position_embeddings": SWITCH,
        "rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
    },
    "gemma3_text/longrope-and-linear": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        **_WINDOWS,
        "rope_parameters": {
            "sliding_attention": {**_LONGROPE, "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "gemma4_text/proportional": {
        "head_dim": 16,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        **_WINDOWS,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1e6,
            },
        },
    },
    "gemma3_text/two-switches": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        **_WINDOWS,
        "rope_parameters": {
            "sliding_attention": {**_LONGROPE, "rope_theta": 1e4},
            "full_attention": {
                **_LONGROPE,
                "original_max_position_embeddings": SWITCH + 6,
                "rope_theta": 1e6,
            },
        },
    },
}
"""One of each way to stretch positions that the library has, some by layer type."""

REFUSED: dict[str, Mapping[str, Any]] = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "falcon": {},
    "falcon/alibi": {"alibi": True},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global"], 3]], "num_layers": 3, "num_heads": 4},
    "codegen": {**_GPT2, "rotary_dim": 8},
    "xglm": {"d_model": 64, "attention_heads": 4, "num_layers": 3, "ffn_dim": 96},
    "qwen3_next": {**_MOE, "head_dim": 16, "num_hidden_layers": 4},
    "qwen3_5_text": {"head_dim": 16, "num_hidden_layers": 4},
    "mamba": {"state_size": 8},
}


def tiny_model(name: str, **changes: Any) -> Any:
    """A random model in float32, in evaluation mode, seeded by its `name` in a table above.

    `name` is a model type, with a variant after a slash. Weights are larger than usual at the
    start of training, so that attention matters: logits have a standard deviation of about 1.
    """
    overrides = {**REFUSED, **ROPES, **SERVED}[name]
    config = transformers.AutoConfig.for_model(
        name.partition("/")[0], **{**_SIZES, **deepcopy(dict(overrides)), **changes}
    )
    torch.manual_seed(sum(name.encode()))
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.9 / parameter.shape[-1] ** 0.5)
            elif "norm" in key or "ln" in key:
                parameter.normal_(1 if parameter.mean() > 0.5 else 0, 0.1)
            else:
                parameter.normal_(0, 0.1)
    return model.eval()


def save_tiny_model(name: str, model_dir: Path, **changes: Any) -> None:
    """Write the model to a directory that can be served, with the demo model's tokenizer."""
    tokenizer = DEMO_MODEL_DIR / "tokenizer.json"
    vocab_size = len(json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]) + 64
    tiny_model(name, **{"vocab_size": vocab_size, **changes}).save_pretrained(model_dir)
    shutil.copy(tokenizer, model_dir)
