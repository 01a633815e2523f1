"""The engine beside other engines: the same random model, prompts and number of new tokens."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.contender import CONTENDERS
from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine
from bench.gpu_check.whole_models import SHAPES

_LIMIT_S = 75.0
_SLOW_LIMIT_S = 400.0  # on a CPU that others use too
OURS = "pdserve"


def measure(machine: Machine) -> Iterator[Finding]:
    shape = machine.size("1B", "tiny")
    count, length, new = machine.size((128, 512, 128), (3, 20, 4))
    with tempfile.TemporaryDirectory() as folder:
        _write_model(machine, shape, Path(folder))
        rates: dict[str, float] = {}
        tokens: dict[str, list[list[int]]] = {}
        for name in CONTENDERS:
            what = f"{name}: {count} prompts of {length}, {new} new tokens each"
            if name == "vllm" and importlib.util.find_spec("vllm") is None:
                yield Finding(what=what, value="left out", note="not installed: vllm")
                continue
            sizes = (count, length, new, SHAPES[shape]["vocab_size"])
            limit_s = machine.size(_LIMIT_S, _SLOW_LIMIT_S)
            said = _run(name, folder, str(machine.device), sizes, limit_s)
            if isinstance(said, str):
                if name == OURS:
                    yield must(what, False, note=said)
                else:
                    yield Finding(what=what, value="failed", note=said)
                continue
            rates[name], tokens[name] = count * new / said["elapsed_s"], said["tokens"]
            yield Finding(
                what=what, value=rates[name], unit="tokens/s", note=_beside(rates, tokens)
            )


def _beside(rates: dict[str, float], tokens: dict[str, list[list[int]]]) -> str:
    """Of the contender that ran last, against ours."""
    name = list(rates)[-1]
    if name == OURS or OURS not in rates:
        return ""
    pairs = list(zip(tokens[OURS], tokens[name], strict=True))
    same = sum(mine == theirs for mine, theirs in pairs)
    return f"pdserve is at {rates[OURS] / rates[name]:.2f} of it; {same}/{len(pairs)} same answers"


def _write_model(machine: Machine, shape: str, folder: Path) -> None:
    """Weights, and a tokenizer that nobody uses."""
    import tokenizers
    import transformers

    library: Any = transformers
    torch.manual_seed(6)
    config = library.LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    dtype = machine.size(torch.bfloat16, torch.float32)
    with machine.device:
        model = library.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _run(
    name: str, folder: str, device: str, sizes: tuple[int, ...], limit_s: float
) -> dict[str, Any] | str:
    """What the contender says, or why it says nothing."""
    command = [sys.executable, "-m", "bench.gpu_check.contender", name, folder, device]
    try:
        ended = subprocess.run(
            [*command, *map(str, sizes)],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"ended after {limit_s:.0f} s"
    if ended.returncode != 0:
        return f"exit code {ended.returncode}: {ended.stderr[-300:].strip()}"
    said: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return said
