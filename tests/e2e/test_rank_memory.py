"""A rank holds its share of the weights, and takes hardly more while it loads them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import save_tiny_model

MAX_SHARE = 0.3  # of the whole weights, for a rank of tp 4
MAX_PEAK = 1.5  # of a rank's own weights


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 M parameters, 22 % of them in embedding and output layer; KV heads fewer than ranks."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(
        "llama",
        path,
        vocab_size=7200,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=48,
        tie_word_embeddings=False,
    )
    return path


def measured(model_dir: Path, tp: int, pp: int) -> list[dict[str, int]]:
    command = [sys.executable, "-m", "tests.support.rank_memory", str(model_dir), str(tp), str(pp)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_ranks_hold_their_share_and_take_little_more_to_load_it(model_dir: Path) -> None:
    whole = (model_dir / "model.safetensors").stat().st_size
    assert 24e6 < whole / 4 < 26e6
    ranks = measured(model_dir, 4, 1)
    assert len(ranks) == 4
    for rank in ranks:
        assert rank["weights"] < MAX_SHARE * whole
        assert rank["peak"] < MAX_PEAK * rank["weights"]
