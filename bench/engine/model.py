"""The model that all contenders run: a random Llama of 25 M parameters, seeded."""

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 4096


def write_model(model_dir: Path, *, num_kv_heads: int = 2, max_context_tokens: int = 2048) -> int:
    """Write config, weights and a tokenizer that nobody uses; return the number of parameters.

    With 8 KV heads, as many as there are query heads, it has 27 M.
    """
    import tokenizers
    import torch
    import transformers

    transformers_any: Any = transformers
    config = transformers_any.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=64,
        max_position_embeddings=max_context_tokens,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(25)
    model = transformers_any.LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(model_dir)
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(model_dir / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    return sum(parameter.numel() for parameter in model.parameters())
