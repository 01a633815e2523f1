"""The models that ship in the package: their files, their limits, and that they learned Python."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdserve.models import DEMO_DRAFT_MODEL_DIR, DEMO_MODEL_DIR

DIRS = (DEMO_MODEL_DIR, DEMO_DRAFT_MODEL_DIR)
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL_DIR / "tokenizer.json"))
AUTO_TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
# Written for this test, so in no training file. A uniform guess costs ln 2048 = 7.6 nats a token.
SNIPPET = '''\
class ShelfError(Exception):
    """Raised when a shelf cannot hold another book."""


class Shelf:
    """A shelf of books with a limited width."""

    def __init__(self, width, books=None):
        self.width = width
        self.books = list(books) if books is not None else []

    def add(self, book):
        if book.width > self.width:
            raise ShelfError("no room for %r" % book)
        self.books.append(book)
        self.width -= book.width

    def __len__(self):
        return len(self.books)

    def find(self, title):
        for book in self.books:
            if book.title == title:
                return book
        return None
'''


def num_parameters(folder: Path) -> int:
    """Parameters in the weights file; tied weights are stored once."""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118


def loss_of(folder: Path, text: str) -> float:
    """Mean nats per token of `text` after a `bos`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([TOKENIZER.encode(text).ids])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_both_models_together_fit_ten_megabytes() -> None:
    assert sum(path.stat().st_size for folder in DIRS for path in folder.iterdir()) <= 10_000_000


def test_draft_has_at_most_a_quarter_of_the_parameters() -> None:
    assert num_parameters(DEMO_DRAFT_MODEL_DIR) * 4 <= num_parameters(DEMO_MODEL_DIR)


@pytest.mark.parametrize("folder", DIRS, ids=lambda folder: folder.name)
def test_configuration_agrees_with_the_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 1024
    assert config["head_dim"] == 32
    assert config["vocab_size"] == TOKENIZER.get_vocab_size() == 2048
    assert config["bos_token_id"] == TOKENIZER.token_to_id("<|begin_of_text|>")
    assert config["eos_token_id"] == TOKENIZER.token_to_id("<|end_of_text|>")


@pytest.mark.parametrize("folder", DIRS, ids=lambda folder: folder.name)
def test_model_card_names_licence_and_purpose(folder: Path) -> None:
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Not for real use" in card
    assert "PSF License" in card


def test_draft_has_the_tokenizer_of_the_model() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (DEMO_DRAFT_MODEL_DIR / name).read_bytes() == (DEMO_MODEL_DIR / name).read_bytes()


def test_encoding_starts_with_bos() -> None:
    assert TOKENIZER.encode("x = 1").ids[0] == TOKENIZER.token_to_id("<|begin_of_text|>")
    assert TOKENIZER.encode("").ids == [TOKENIZER.token_to_id("<|begin_of_text|>")]


def test_decoding_gives_source_text_back() -> None:
    for text in (SNIPPET, Path(json.__file__).read_text(encoding="utf-8")):
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@given(text=st.text())
def test_decoding_gives_any_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@given(text=st.text())
def test_transformers_reads_the_same_tokenizer(text: str) -> None:
    loaded = AUTO_TOKENIZER(text)["input_ids"]
    assert loaded == TOKENIZER.encode(text).ids


def test_weights_are_bfloat16() -> None:
    for folder in DIRS:
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
        assert dtypes == {torch.bfloat16}


def test_model_learned_python_and_more_than_its_draft() -> None:
    model, draft = loss_of(DEMO_MODEL_DIR, SNIPPET), loss_of(DEMO_DRAFT_MODEL_DIR, SNIPPET)
    assert model < draft < 3.5
    assert model < 3.0


@pytest.mark.parametrize("folder", DIRS, ids=lambda folder: folder.name)
def test_late_positions_are_as_good_as_early_ones(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([TOKENIZER.encode(SNIPPET * 8).ids[:1024]])
    assert ids.shape == (1, 1024)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    copies = torch.split(
        losses, len(TOKENIZER.encode(SNIPPET).ids) - 1
    )  # same text, later and later
    assert float(copies[-2].mean()) < float(copies[0].mean()) + 0.1  # [-1] is cut short
