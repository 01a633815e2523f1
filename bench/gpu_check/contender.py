"""One engine of the comparison, in its own process: `-m bench.gpu_check.contender NAME DIR DEVICE`.

Loads the model of a directory, serves all prompts once to warm up, then once more, and prints a
line of JSON: seconds, and tokens.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Sequence[Sequence[int]]]

_STEP_TOKENS = 2048


def ours(model_dir: Path, device: str, max_num_tokens: int, num_requests: int) -> Generate:
    from bench.engine.run_pdserve import Scheduler
    from bench.gpu_check.machine import open_machine
    from bench.gpu_check.runtimes import opened_runtime
    from pdserve.engine.contract import StepLimits
    from pdserve.engine.torch_engine import TorchEngine

    machine = open_machine(device)
    num_blocks = max_num_tokens // 16 + num_requests
    runtime: Any = opened_runtime(machine).__enter__()  # until the process ends
    engine = TorchEngine.load(
        model_dir,
        block_size=16,
        num_blocks=num_blocks,
        dtype=machine.size("bfloat16", "float32"),
        device=runtime,
        attention=machine.size("triton", "torch"),
        limits=StepLimits(max_num_requests=num_requests, max_num_tokens=_STEP_TOKENS),
    )
    scheduler = Scheduler(engine, num_blocks=num_blocks, max_num_step_tokens=_STEP_TOKENS)
    return scheduler.generate


def library(model_dir: Path, device: str, max_num_tokens: int, num_requests: int) -> Generate:
    import transformers

    library: Any = transformers
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = library.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    batching = library.ContinuousBatchingConfig(
        page_size=32,
        num_blocks=max_num_tokens // 32 + 2 * num_requests,
        max_batch_tokens=_STEP_TOKENS,
        allow_block_sharing=False,
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

    return generate


def vllm(model_dir: Path, device: str, max_num_tokens: int, num_requests: int) -> Generate:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm  # type: ignore[import-not-found]

    engine = vllm.LLM(
        model=str(model_dir),
        skip_tokenizer_init=True,
        dtype="float32" if device == "cpu" else "bfloat16",
        enable_prefix_caching=False,
        max_model_len=2048,
        max_num_seqs=num_requests,
        gpu_memory_utilization=0.5,
    )

    def generate(prompts: Prompts, num_new_tokens: int) -> list[list[int]]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(requests, params, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in outputs]

    return generate


CONTENDERS = {"pdserve": ours, "transformers": library, "vllm": vllm}


def main() -> None:
    name, folder, device, num_requests, num_prompt_tokens, num_new_tokens, vocab_size = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    count, length, new = int(num_requests), int(num_prompt_tokens), int(num_new_tokens)
    torch.set_num_threads(1)
    generate = CONTENDERS[name](Path(folder), device, count * (length + new), count)
    rng = random.Random(5)
    prompts = [[rng.randrange(int(vocab_size)) for _ in range(length)] for _ in range(count)]
    generate(prompts[: max(1, count // 4)], min(4, new))
    began_s = time.perf_counter()
    tokens = [list(each) for each in generate(prompts, new)]
    elapsed_s = time.perf_counter() - began_s
    out.write(json.dumps({"elapsed_s": elapsed_s, "tokens": tokens}) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
