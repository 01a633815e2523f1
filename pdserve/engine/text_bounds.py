"""How much text one token can stand for: from it follows which texts can never fit a context.

The bound is for text as it comes, before the tokenizer normalises it. It exists only if the
tokenizer drops nothing: then every character is in some token, and

    characters of a text <= tokens * longest token * shrinking by the normaliser

Whatever may drop characters without limit (collapsed or stripped whitespace, accents or control
characters that are removed, runs of unknown characters that become one token) has no bound.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers.models import BPE

_NFC_SHRINK = 4
"""Characters that composition may join to one: none decomposes to more (UAX #15)."""
_NORMALIZERS: Mapping[str, int] = {
    "ByteLevel": 1,
    "Lowercase": 1,
    "NFC": _NFC_SHRINK,
    "NFD": 1,
    "NFKC": _NFC_SHRINK,
    "NFKD": 1,
    "Prepend": 1,
}
_PRE_TOKENIZERS = frozenset(
    {"ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}
)
_NUM_BYTES = 256


def max_chars_per_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The most characters of a text that one token stands for; None if there is no bound."""
    shrink = _shrink(_state(tokenizer.normalizer))
    if shrink is None or not _keeps_all(_state(tokenizer.pre_tokenizer)):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None  # it swallows whatever whitespace is beside it
    if not _knows_all(tokenizer):
        return None
    names = [*tokenizer.get_vocab(), *(token.content for token in added)]
    return shrink * max(map(len, names), default=1)


def _state(part: Any) -> Mapping[str, Any] | None:
    """A part of a tokenizer as tokenizer.json writes it."""
    return None if part is None else json.loads(part.__getstate__())


def _shrink(normalizer: Mapping[str, Any] | None) -> int | None:
    """How many characters become one at most; None if there is no limit, or it is not known."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        factor = 1
        for part in normalizer["normalizers"]:
            shrink = _shrink(part)
            if shrink is None:
                return None
            factor *= shrink
        return factor
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern and len(normalizer["content"]) >= len(pattern) else None
    return _NORMALIZERS.get(kind)


def _keeps_all(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """True if it only cuts; those that split by whitespace drop it."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
    is_known = pre_tokenizer["type"] in _PRE_TOKENIZERS
    return is_known and pre_tokenizer.get("behavior") != "Removed"


def _knows_all(tokenizer: tokenizers.Tokenizer) -> bool:
    """True if each character, however rare, makes a token of its own or is part of one."""
    model = tokenizer.model
    if not isinstance(model, BPE):
        return False  # the others make one unknown token of a whole word or run
    if model.byte_fallback and _has_all(tokenizer, [f"<0x{byte:02X}>" for byte in range(256)]):
        return True
    if model.unk_token is not None:
        return tokenizer.token_to_id(model.unk_token) is not None and not model.fuse_unk
    is_byte_level = _is_byte_level(_state(tokenizer.pre_tokenizer)) or _is_byte_level(
        _state(tokenizer.normalizer)
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    is_plain = not (model.continuing_subword_prefix or model.end_of_word_suffix)
    return is_byte_level and is_plain and _has_all(tokenizer, alphabet)


def _is_byte_level(part: Mapping[str, Any] | None) -> bool:
    if part is None:
        return False
    inner = (*part.get("pretokenizers", ()), *part.get("normalizers", ()))
    return part["type"] == "ByteLevel" or any(map(_is_byte_level, inner))


def _has_all(tokenizer: tokenizers.Tokenizer, names: list[str]) -> bool:
    known = [tokenizer.token_to_id(name) for name in names]
    return len(known) == _NUM_BYTES and None not in known
