"""Tiny random models of many architectures, built from their configs; nothing is downloaded."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

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


def tiny_model(name: str) -> Any:
    """A random model of `SERVED` or `REFUSED`, float32, in evaluation mode, seeded by `name`.

    `name` is a model type, with a variant after a slash. Weights are larger than usual at the
    start of training, so that attention matters: logits have a standard deviation of about 1.
    """
    overrides = SERVED.get(name, REFUSED.get(name))
    assert overrides is not None, name
    config = transformers.AutoConfig.for_model(name.partition("/")[0], **{**_SIZES, **overrides})
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
