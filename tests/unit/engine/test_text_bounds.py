"""No text that fits is beyond the bound, whatever its tokenizer does to it."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from pdserve.engine.text_bounds import max_chars_per_token

COMPOSED = "ΐΰἒἓἲἳὂὃ"  # each is three characters, decomposed
WORDS = ("the", "world", "hello", COMPOSED)
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
ALPHABET = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
TEXTS = st.text(max_size=60) | st.text(
    alphabet="aeth world\n\u0301\u0323\u1100\u1161\u11a8ÅéΐＡﬁ漢🙂<s>", max_size=200
)


def merged(vocab: dict[str, int]) -> models.BPE:
    """A vocabulary with words, each built from its beginning on."""
    vocab, merges = dict(vocab), []
    for word in WORDS:
        for end in range(1, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
            vocab.setdefault(word[end - 1], len(vocab))
            if end > 1:
                merges.append((word[: end - 1], word[end - 1]))
    return models.BPE(vocab=vocab, merges=merges)


def built(
    model: Any,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    added: Sequence[AddedToken] = (),
    **changes: Any,
) -> tokenizers.Tokenizer:
    for name, value in changes.items():
        setattr(model, name, value)
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def byte_level(normalizer: Any = None, **changes: Any) -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\S+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return built(merged(ALPHABET), normalizer, pre_tokenizer, **changes)


def fallback(normalizer: Any = None, **changes: Any) -> tokenizers.Tokenizer:
    return built(merged(BYTES), normalizer, byte_fallback=True, **changes)


def unknowns(normalizer: Any = None, **changes: Any) -> tokenizers.Tokenizer:
    return built(merged({"<unk>": 0}), normalizer, unk_token="<unk>", **changes)


SENTENCE_PIECE = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BEGIN = AddedToken("<begin of a long text>", special=True)

BOUNDED: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level,
    "byte level, NFC": lambda: byte_level(normalizers.NFC()),
    "byte level, NFKC": lambda: byte_level(normalizers.NFKC()),
    "byte level, lower case": lambda: byte_level(normalizers.Lowercase()),
    "byte level, decomposed": lambda: byte_level(normalizers.NFKD()),
    "byte level, added": lambda: byte_level(added=[BEGIN]),
    "byte level by normaliser": lambda: built(merged(ALPHABET), normalizers.ByteLevel()),
    "fallback": lambda: fallback(SENTENCE_PIECE),
    "fallback, NFC": lambda: fallback(normalizers.Sequence([normalizers.NFC(), SENTENCE_PIECE])),
    "unknown characters": unknowns,
}
UNBOUNDED: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "collapsed whitespace": (
        lambda: byte_level(normalizers.Replace(tokenizers.Regex(r"\s+"), " ")),
        " " * 5000,
    ),
    "removed text": (lambda: byte_level(normalizers.Replace("x", "")), "x" * 5000),
    "shortened text": (lambda: byte_level(normalizers.Replace("x" * 5000, " ")), "x" * 5000),
    "stripped whitespace": (lambda: byte_level(normalizers.Strip()), "a" + " " * 5000),
    "stripped accents": (
        lambda: byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "e" + "\u0301" * 5000,
    ),
    "cleaned text": (lambda: byte_level(normalizers.BertNormalizer()), "a" + "\x01" * 5000),
    "dropped by cutting": (
        lambda: built(
            merged(ALPHABET),
            None,
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]),
        ),
        "a" + " " * 5000 + "b",
    ),
    "split that removes": (
        lambda: built(merged(ALPHABET), None, pre_tokenizers.Split("x", "removed")),
        "x" * 5000,
    ),
    "joined unknowns": (lambda: unknowns(fuse_unk=True), "漢" * 5000),
    "dropped unknowns": (lambda: built(merged({})), "漢" * 5000),
    "half a byte alphabet": (
        lambda: built(
            merged({name: i for name, i in BYTES.items() if i < 128}), byte_fallback=True
        ),
        "漢" * 5000,
    ),
    "whitespace taken by a token": (
        lambda: byte_level(added=[AddedToken("<mask>", lstrip=True)]),
        " " * 5000 + "<mask>",
    ),
    "words that are unknown whole": (
        lambda: built(
            models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"),
            None,
            pre_tokenizers.Whitespace(),
        ),
        "b" * 5000,
    ),
    "unigram": (lambda: built(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "漢" * 5000),
}


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_every_text_has_at_least_the_tokens_that_its_length_asks_for(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]()
    bound = max_chars_per_token(tokenizer)
    assert bound is not None
    num_tokens = len(tokenizer.encode(text).ids)
    assert len(text) <= bound * num_tokens, (name, text)


def test_characters_that_the_normaliser_joins_count_each() -> None:
    tokenizer = fallback(normalizers.NFC())
    text = unicodedata.normalize("NFD", COMPOSED)
    num_tokens = len(tokenizer.encode(text).ids)
    longest = max(map(len, tokenizer.get_vocab()))
    assert longest * num_tokens < len(text) <= (max_chars_per_token(tokenizer) or 0) * num_tokens


@pytest.mark.parametrize("name", BOUNDED)
def test_bound_is_no_larger_than_it_must_be(name: str) -> None:
    tokenizer = BOUNDED[name]()
    bound = max_chars_per_token(tokenizer)
    longest = max(map(len, tokenizer.get_vocab()))
    assert bound in (longest, 4 * longest)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_tokenizer_that_drops_text_has_no_bound(name: str) -> None:
    build, text = UNBOUNDED[name]
    tokenizer = build()
    assert len(tokenizer.encode(text).ids) < 5  # the text shows why
    assert max_chars_per_token(tokenizer) is None
