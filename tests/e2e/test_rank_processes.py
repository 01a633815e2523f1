"""Ranks as real processes give the tokens of one plain process, greedy and sampled."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import save_tiny_model

PLANS = [(2, 1), (1, 2), (2, 2), (4, 1)]
ALL_PLANS = [*PLANS, (4, 2)]
SEED = 20261128
WITHIN_S = 600


def prompts(vocab_size: int) -> list[list[int]]:
    rng = random.Random(SEED)
    return [[rng.randrange(3, vocab_size) for _ in range(size)] for size in (3, 30, 47, 16)]


def answers(model: str, plans: list[tuple[int, int]], folder: Path) -> list[Any]:
    """Of each plan, by its own processes."""
    jobs = [
        {
            "settings": {
                "role": "decode",
                "worker_id": "decode-0",
                "engine": {"model": model, "tp": tp, "pp": pp, "num_blocks": 128, "block_size": 8},
            },
            "prompts": prompts(1000),
            "num_tokens": 16,
        }
        for tp, pp in plans
    ]
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.rank_program", str(path)],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("demo", PLANS),
        ("one KV head", [(2, 1), (2, 2)]),
        pytest.param("one KV head", ALL_PLANS, marks=pytest.mark.slow),
        pytest.param("four KV heads", ALL_PLANS, marks=pytest.mark.slow),
    ],
)
def test_tokens_of_rank_processes_equal_those_of_one_plain_process(
    name: str, plans: list[tuple[int, int]], tmp_path: Path
) -> None:
    model = name
    if name != "demo":
        model = str(tmp_path / "model")
        num_kv_heads = 1 if name.startswith("one") else 4
        save_tiny_model("llama", Path(model), num_key_value_heads=num_kv_heads, num_hidden_layers=2)
    plain, *divided = answers(model, [(1, 1), *plans], tmp_path)
    for plan, each in zip(plans, divided, strict=True):
        assert each == plain, f"{name}, tp and pp {plan}, seed {SEED}"
    assert len({tuple(tokens) for tokens in plain}) > len(plain) / 2  # they say something
