"""Peer: continuous batching of `transformers` (`generate_batch`)."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from bench.engine.runner import Prompts, dtype, model_dir, serve


def main() -> None:
    torch.set_num_threads(1)
    library: Any = transformers
    model = library.AutoModelForCausalLM.from_pretrained(
        model_dir(), dtype=getattr(torch, dtype()), attn_implementation="sdpa"
    ).eval()
    batching = library.ContinuousBatchingConfig(
        page_size=32, num_blocks=512, max_batch_tokens=256, allow_block_sharing=False
    )

    def generate(prompts: Prompts, num_new_tokens: int) -> Sequence[Sequence[int]]:
        config = library.GenerationConfig(
            max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching
        )
        ordered = sorted(outputs.values(), key=lambda each: int(each.request_id.split("_")[-1]))
        return [each.generated_tokens for each in ordered]

    serve(generate)


if __name__ == "__main__":
    main()
