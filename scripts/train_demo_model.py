"""Train the demo model and its draft on the source text of Python's standard library.

    python scripts/train_demo_model.py                      # both models, about 50 minutes
    python scripts/train_demo_model.py --steps 2000 2000    # exactly so many steps each
    python scripts/train_demo_model.py --draft              # the draft alone, tokenizer kept

A time budget sets the number of steps by a short speed probe; the schedule depends on steps
only, so the same `--steps` on the same Python and torch repeats a run. Step `i` draws its batch
from a generator seeded with `(seed, i)`: `--resume` continues from a checkpoint as if never
stopped.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pdserve.models import DEMO_DRAFT_MODEL_DIR, DEMO_MODEL_DIR

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
CONTEXT = 1024
VOCAB = 2048
TOKENS_PER_STEP = 4096
WARMUP_STEPS = 40
PEAK_LR = 8e-3
WEIGHT_DECAY = 0.1
# Newline and indent are one piece, so a line of code costs one token for its layout.
PIECES = r"\n+[ \t]*| ?_*\p{L}+(?:__)?| ?\d| ?[^\s\p{L}\d]+|\s+"
# Tests, generated tables and data, and the build's own settings (they hold machine paths).
SKIPPED_DIRS = frozenset(
    {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "html/entities.py")
PROMPTS = ("def read_lines(path):", "class Stack:")

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One model: where it goes, its shape, and its share of the time budget."""

    title: str
    folder: Path
    hidden: int
    intermediate: int
    layers: int
    heads: int
    share: float

    def config(self) -> LlamaConfig:
        """Llama, tied embeddings, heads of 32, two KV heads."""
        return LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )


MAIN = Recipe(
    title="pdserve demo model",
    folder=DEMO_MODEL_DIR,
    hidden=256,
    intermediate=704,
    layers=4,
    heads=8,
    share=0.8,
)
DRAFT = Recipe(
    title="pdserve demo draft model",
    folder=DEMO_DRAFT_MODEL_DIR,
    hidden=128,
    intermediate=384,
    layers=2,
    heads=4,
    share=0.2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Source files by split; the split is a function of the path alone."""

    train: list[str]
    held_out: list[str]


def read_corpus() -> Corpus:
    """The standard library of the running interpreter, in path order; about 2% held out."""
    root = Path(sysconfig.get_path("stdlib"))
    corpus = Corpus(train=[], held_out=[])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_DIRS.intersection(name.split("/")) or name.startswith(SKIPPED_PREFIXES):
            continue
        is_held_out = hashlib.sha256(name.encode()).digest()[0] < 256 // 50
        text = path.read_text(encoding="utf-8", errors="replace")
        (corpus.held_out if is_held_out else corpus.train).append(text)
    return corpus


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every string has an encoding, and decoding gives the string back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    if (size := tokenizer.get_vocab_size()) != VOCAB:
        raise ValueError(f"the tokenizer has {size} tokens, not {VOCAB}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Tokens]:
    """One array a document, `eos` at its end, no `bos`."""
    return [
        np.array([*tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID], dtype=np.int64)
        for text in texts
    ]


class Batches:
    """Training sequences, each a `bos` and then the corpus from the start of some line.

    A start in the middle of an indented block keeps its newline-and-indent token; a start at
    column zero drops the newline, which is how a prompt such as `def f(x):` begins.
    """

    def __init__(self, tokenizer: Tokenizer, documents: list[Tokens], seed: int) -> None:
        self.stream = np.concatenate(documents)
        self.seed = seed
        pieces = [tokenizer.decode([i]) for i in range(VOCAB)]
        indents = np.array([p.startswith("\n") and p.strip("\n") != "" for p in pieces])
        newlines = np.array([p.strip("\n") == "" and p != "" for p in pieces])
        newlines[EOS_ID] = True
        (after_newline,) = np.nonzero(newlines[self.stream])
        (at_indent,) = np.nonzero(indents[self.stream])
        self.starts = np.concatenate([after_newline + 1, at_indent])
        self.starts = self.starts[self.starts < len(self.stream) - CONTEXT]

    def at(self, step: int) -> torch.Tensor:
        """Batch of `step`: [sequences, length + 1]; half of the steps 256 long, a quarter 1024."""
        rng = np.random.default_rng((self.seed, step))
        length = int(rng.choice([256, 256, 512, CONTEXT]))
        starts = rng.choice(self.starts, size=TOKENS_PER_STEP // length)
        rows = self.stream[starts[:, None] + np.arange(length)]
        return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=BOS_ID))


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Nats of every token after the first; rows: [sequences, length + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    )


def held_out_loss(
    model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]
) -> tuple[float, float]:
    """(nats per token, bits per byte) over windows that fill the context and do not overlap."""
    nats, num_tokens = 0.0, 0
    for document in encode(tokenizer, texts):
        for start in range(0, len(document), CONTEXT):
            window = torch.from_numpy(document[start : start + CONTEXT])
            rows = functional.pad(window, (1, 0), value=BOS_ID)[None]
            with torch.no_grad():
                nats += float(token_losses(model, rows).sum())
            num_tokens += len(window)
    num_bytes = sum(len(text.encode()) for text in texts)
    return nats / num_tokens, nats / math.log(2) / num_bytes


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = model.get_input_embeddings().weight
    groups: list[dict[str, Any]] = [
        {"params": [embedding]},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            inner, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95)),
    ]


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine that ends at a hundredth of the peak."""
    warmup = min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, num_steps // 10)))
    return PEAK_LR * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


class Trainer:
    """A model in training: fp32 weights, bf16 arithmetic, everything a checkpoint must hold."""

    def __init__(self, recipe: Recipe, batches: Batches, checkpoint: Path) -> None:
        torch.manual_seed(batches.seed)
        self.model = LlamaForCausalLM(recipe.config())
        self.optimizers = make_optimizers(self.model)
        self.batches = batches
        self.checkpoint = checkpoint
        self.step = 0
        self.wall_s = 0.0

    def advance(self, lr: float) -> float:
        """One step at learning rate `lr`; returns its mean loss before the update."""
        began_s = time.perf_counter()
        loss = token_losses(self.model, self.batches.at(self.step)).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.wall_s += time.perf_counter() - began_s
        return float(loss.detach())

    def run(self, num_steps: int) -> Iterator[float]:
        """Yield the loss of every step until `num_steps`, with a checkpoint each hundred."""
        while self.step < num_steps:
            yield self.advance(learning_rate(self.step, num_steps))
            if self.step % 100 == 0 or self.step == num_steps:
                self.save()

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        partial = self.checkpoint.with_suffix(".partial")
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save((self.model.state_dict(), states, self.step, self.wall_s), partial)
        partial.replace(self.checkpoint)

    def load(self) -> None:
        """Continue from the checkpoint where there is one."""
        if not self.checkpoint.exists():
            return
        weights, states, self.step, self.wall_s = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def steps_within(recipe: Recipe, batches: Batches, budget_s: float) -> int:
    """How many steps the budget allows, by twelve steps of a throwaway model."""
    probe = Trainer(recipe, batches, Path("unused"))
    for _ in range(2):
        probe.advance(PEAK_LR)
    warm_s = probe.wall_s
    for _ in range(12):
        probe.advance(PEAK_LR)
    step_s = (probe.wall_s - warm_s) / 12
    print(f"probe: {step_s:.2f} s a step, {TOKENS_PER_STEP / step_s:.0f} tokens/s", flush=True)
    return max(20, int(budget_s / step_s))


def complete(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt and its 96 most likely next tokens, chosen one at a time."""
    ids: list[int] = tokenizer.encode(prompt).ids
    for _ in range(96):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == EOS_ID:
            break
    return str(tokenizer.decode(ids))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as a text file with a line for each key."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Write bf16 weights, configuration and tokenizer as a Hugging Face model folder."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(recipe.folder)
    (recipe.folder / "model.safetensors").chmod(0o644)  # written readable by its owner alone
    tokenizer.save(str(recipe.folder / "tokenizer.json"))
    write_json(
        recipe.folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(
        recipe.folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False},
    )


def write_card(
    recipe: Recipe, trainer: Trainer, held_out: tuple[float, float], samples: list[str]
) -> None:
    """Write MODEL_CARD.md beside the weights."""
    config = recipe.config()
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    weights_bytes = (recipe.folder / "model.safetensors").stat().st_size
    num_tokens = trainer.step * TOKENS_PER_STEP
    blocks = "\n\n".join(f"```python\n{sample.rstrip()}\n```" for sample in samples)
    card = f"""# {recipe.title}

A demo model: it exists so that pdserve can be tried and tested offline. **Not for real use.**
It writes text that looks like Python and is usually wrong.

| | |
| --- | --- |
| shape | Llama: {config.num_hidden_layers} layers, hidden {config.hidden_size}, \
{config.num_attention_heads} heads of 32, 2 KV heads, SwiGLU {config.intermediate_size}, \
tied embeddings, RoPE theta 10000 |
| context | {CONTEXT} tokens, all positions trained |
| parameters | {num_parameters:,} (bfloat16, {weights_bytes:,} bytes) |
| tokenizer | byte-level BPE, {VOCAB} tokens, one for both demo models |
| data | source text of the standard library of Python {platform.python_version()}, without \
tests, generated tables and data |
| licence of the data | PSF License Agreement (Python Software Foundation) |
| training | {trainer.step} steps of {TOKENS_PER_STEP} tokens ({num_tokens / 1e6:.1f}M tokens, \
{num_tokens / len(trainer.batches.stream):.1f} passes over {len(trainer.batches.stream):,}), \
sequences of 256, 512 and 1024 |
| optimiser | Muon (matrices) and AdamW (embedding, norms), peak rate {PEAK_LR}, cosine, \
weight decay {WEIGHT_DECAY}, gradient norm clipped at 1, seed {trainer.batches.seed} |
| arithmetic | fp32 weights, bf16 autocast, torch {torch.__version__}, one CPU thread |
| wall time | {trainer.wall_s / 60:.0f} minutes |
| held-out loss | {held_out[0]:.3f} nats/token, {held_out[1]:.3f} bits/byte \
(files held out by a hash of the path, about 2%; bfloat16 weights) |

Made by `scripts/train_demo_model.py`. Greedy output:

{blocks}
"""
    (recipe.folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def make_model(
    recipe: Recipe,
    tokenizer: Tokenizer,
    corpus: Corpus,
    num_steps: int | None,
    arguments: argparse.Namespace,
) -> None:
    """Train one model, measure it as it will be shipped, and write its folder."""
    batches = Batches(tokenizer, encode(tokenizer, corpus.train), arguments.seed)
    steps = num_steps or steps_within(recipe, batches, arguments.minutes * 60 * recipe.share)
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, batches, arguments.checkpoints / f"{recipe.folder.name}.pt")
    if arguments.resume:
        trainer.load()
    print(f"{recipe.title}: {steps} steps, {len(batches.stream):,} tokens of text", flush=True)
    recent: list[float] = []
    for loss in trainer.run(steps):
        recent.append(loss)
        if trainer.step % 20 == 0 or trainer.step == steps:
            mean = sum(recent[-20:]) / len(recent[-20:])
            print(f"step {trainer.step}/{steps} loss {mean:.3f} {trainer.wall_s:.0f} s", flush=True)
    export(recipe, trainer.model, tokenizer)
    trainer.model.type(torch.float32)  # the values as rounded to bfloat16
    held_out = held_out_loss(trainer.model, tokenizer, corpus.held_out)
    samples = [complete(trainer.model, tokenizer, prompt) for prompt in PROMPTS]
    write_card(recipe, trainer, held_out, samples)
    print(f"held out: {held_out[0]:.3f} nats/token, {held_out[1]:.3f} bits/byte")
    print("\n\n".join(samples), flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults make both models as they ship."""
    parser = argparse.ArgumentParser(description="Train the demo model and its draft.")
    parser.add_argument("--minutes", type=float, default=50.0, help="time for both models")
    parser.add_argument(
        "--steps", type=int, nargs=2, metavar=("MODEL", "DRAFT"), help="instead of --minutes"
    )
    parser.add_argument("--draft", action="store_true", help="train the draft alone")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "pdserve-demo-model"
    )
    return parser.parse_args()


def main() -> None:
    """Train what was asked for, on one thread."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    corpus = read_corpus()
    steps, draft_steps = arguments.steps or (None, None)
    if arguments.draft:
        tokenizer = Tokenizer.from_file(str(MAIN.folder / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(corpus.train)
        make_model(MAIN, tokenizer, corpus, steps, arguments)
    make_model(DRAFT, tokenizer, corpus, draft_steps, arguments)


if __name__ == "__main__":
    main()
