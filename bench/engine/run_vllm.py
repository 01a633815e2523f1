"""Peer: vLLM on CPU, one process, one core. Runs in its own environment (see install_vllm.sh)."""

import os
import sys

from bench.engine.runner import Prompts, dtype, model_dir, serve

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        # vLLM asks the processor itself which of its two builds to load.
        import torch

        for name in ("_is_avx512_supported", "_is_avx512_bf16_supported"):
            setattr(torch.cpu, name, lambda: False)
    import vllm  # type: ignore[import-not-found]

    engine = vllm.LLM(
        model=model_dir(),
        skip_tokenizer_init=True,
        dtype=dtype(),
        enforce_eager="--eager" in sys.argv,
        enable_prefix_caching=False,
        max_model_len=2048,
        max_num_seqs=256,
    )

    def generate(prompts: Prompts, num_new_tokens: int) -> list[list[int]]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(requests, params, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in outputs]

    serve(generate)


if __name__ == "__main__":
    main()
