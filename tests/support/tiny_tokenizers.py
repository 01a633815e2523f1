"""Small tokenizers of each family, built here; nothing is downloaded.

Ids of the special tokens come after the vocabulary's, so that any id below `num_plain` has text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from pdserve.engine.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
BEGIN, END, TURN_END = SPECIALS = ("<s>", "</s>", "<|im_end|>")
WORDS = ("the", "world", "of", "é", "日本", "🙂", ".", ",", "'s", "a")
CUT_TEXT = "日本語のテキスト日本🙂é ok ñ"


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyTokenizer:
    """`inner` is the library's; `cuts` is true if a character may be cut into several tokens."""

    name: str
    inner: tokenizers.Tokenizer
    tokenizer: Tokenizer
    num_plain: int
    cuts: bool

    def id_of(self, text: str) -> int:
        token_id = self.inner.token_to_id(text)
        assert token_id is not None, text
        return token_id

    def whole(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """One decode of everything, by the library.

        But for byte-fallback tokens, of which the library spoils a whole run for one wrong byte:
        each byte that belongs to no character is one replacement character here, as in
        SentencePiece.
        """
        inner = self.inner
        if self.name.startswith("fallback"):
            special = {inner.token_to_id(text) for text in SPECIALS}
            kept = [i for i in token_ids if i not in special or not skip_special_tokens]
            spelt = [inner.id_to_token(token_id) or "" for token_id in kept]
            joined = re.sub(r"(?:<0x[0-9A-F]{2}>)+", _character_by_character, "".join(spelt))
            text = joined.replace("▁", " ")
            return text.removeprefix(" ") if self.name == "fallback, stripped" else text
        return str(inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def _character_by_character(run: re.Match[str]) -> str:
    data = bytes(int(byte, 16) for byte in re.findall(r"<0x(..)>", run[0]))
    text = ""
    while data:
        for length in (1, 2, 3, 4):
            try:
                text, data = text + data[:length].decode(), data[length:]
                break
            except UnicodeDecodeError:
                continue
        else:
            text, data = text + REPLACEMENT, data[1:]
    return text


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    pairs = {byte: chr(byte) for byte in shown}
    return pairs | {byte: chr(256 + index) for index, byte in enumerate(others)}


@cache
def tiny_tokenizer(name: str) -> TinyTokenizer:
    """One of `TINY_TOKENIZERS`."""
    inner, cuts = _BUILDERS[name]()
    num_plain = inner.get_vocab_size()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, inner.token_to_id(BEGIN))]
    )
    return TinyTokenizer(
        name=name,
        inner=inner,
        tokenizer=Tokenizer(inner, b""),
        num_plain=num_plain,
        cuts=cuts,
    )


def _byte_level() -> tuple[tokenizers.Tokenizer, bool]:
    """Every byte, and pieces of every length that begin and end inside characters."""
    alphabet, data = byte_alphabet(), CUT_TEXT.encode()
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [data[at : at + size] for size in (2, 3, 4, 7) for at in range(len(data) - size)]
    spelt = ["".join(alphabet[byte] for byte in piece) for piece in dict.fromkeys(pieces)]
    inner = tokenizers.Tokenizer(models.BPE(vocab=_numbered(spelt), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner, True


def _fallback(*, strips: bool) -> tuple[tokenizers.Tokenizer, bool]:
    """Llama 2 (`strips`) and Gemma."""
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    spelt += ["▁", "▁▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    vocab = _numbered([*spelt, "<unk>"])
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        inner.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)])
    else:
        inner.normalizer = replace
        inner.decoder = decoders.Sequence(chain)
    return inner, True


def _metaspace() -> tuple[tokenizers.Tokenizer, bool]:
    spelt = ["<unk>", "▁", "▁▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    inner = tokenizers.Tokenizer(models.Unigram([(text, 0.0) for text in spelt], 0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return inner, False


def _word_piece() -> tuple[tokenizers.Tokenizer, bool]:
    spelt = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    inner = tokenizers.Tokenizer(models.WordPiece(_numbered(spelt), unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    return inner, False


def _word_end() -> tuple[tokenizers.Tokenizer, bool]:
    spelt = ["<unk>", *WORDS, *(f"{word}</w>" for word in WORDS)]
    inner = tokenizers.Tokenizer(models.BPE(vocab=_numbered(spelt), merges=[], unk_token="<unk>"))
    inner.decoder = decoders.BPEDecoder()
    return inner, False


def _no_decoder() -> tuple[tokenizers.Tokenizer, bool]:
    inner = tokenizers.Tokenizer(models.WordLevel(_numbered(["<unk>", *WORDS]), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner, False


def _numbered(spelt: Sequence[str]) -> dict[str, int]:
    return {text: token_id for token_id, text in enumerate(dict.fromkeys(spelt))}


_BUILDERS = {
    "byte level": _byte_level,
    "fallback, stripped": lambda: _fallback(strips=True),
    "fallback": lambda: _fallback(strips=False),
    "metaspace": _metaspace,
    "word piece": _word_piece,
    "word end": _word_end,
    "no decoder": _no_decoder,
}
TINY_TOKENIZERS = tuple(_BUILDERS)
