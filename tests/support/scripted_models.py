"""A model whose answer is known: the token after position p is `script[p % len(script)]`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

torch.set_num_threads(1)  # a second one waits for the first, for ages on a busy machine


def save_scripted_model(
    model_dir: Path,
    script: Sequence[int],
    tokenizer: tokenizers.Tokenizer,
    files: Mapping[str, Any],
    *,
    num_positions: int = 128,
) -> None:
    """Write the model, its tokenizer and `files` (JSON by file name) to `model_dir`.

    GPT-2 without a word embedding: one layer that adds nothing to the one-hot embedding of the
    position, and an output layer that maps each position to its token.
    """
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=num_positions,
        n_embd=num_positions,
        n_layer=1,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model: Any = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_attn.weight"):  # attention runs, and is multiplied by zero
                parameter.normal_(0, 0.02)
            elif "ln_" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(num_positions))
        for position in range(num_positions):
            model.lm_head.weight[script[position % len(script)], position] = 1
    model.save_pretrained(model_dir)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    for name, content in files.items():
        (model_dir / name).write_text(json.dumps(content))
