"""Text to tokens and back, a token at a time; needs only the `tokenizers` library."""

import codecs
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from pdserve.domain.errors import LocalFault
from pdserve.engine.model_faults import check_no_pointers
from pdserve.engine.text_bounds import max_chars_per_token

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not, or not yet, a character
_NUM_KEPT_UNITS = 6
"""Tokens that decide how the next one is shown: at least 4, the bytes of the longest character."""
_MAX_UNITS = 2 * _NUM_KEPT_UNITS


class Tokenizer:
    """A model's tokenizer.json. Immutable after loading: any thread may encode."""

    def __init__(self, inner: tokenizers.Tokenizer, digest: bytes) -> None:
        self._inner = inner
        self.digest = digest
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        added = inner.get_added_tokens_decoder()
        self._special = frozenset(id_ for id_, token in added.items() if token.special)
        self.byte_tokens = _byte_tokens(inner)
        self._byte_of = {token_id: byte for byte, token_id in enumerate(self.byte_tokens)}

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Read `model_dir`/tokenizer.json; `LocalFault` if it is missing or corrupt."""
        path = model_dir / "tokenizer.json"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LocalFault(f"cannot read {path}: {error.strerror}") from error
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            check_no_pointers([path])
            raise LocalFault(f"{path} is not a valid tokenizer.json") from error
        inner.no_truncation()
        inner.no_padding()
        return cls(inner, hashlib.blake2b(content, digest_size=16).digest())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokens of `text`, with what the tokenizer adds around it (a begin token, for most).

        A text that begins with the begin token's own text, as chat templates write it, gets no
        second one. Other threads run meanwhile: of the library's ways to encode, those for
        batches release the interpreter's lock, and the fast one leaves out the places of tokens
        in the text.
        """
        [encoding] = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids = encoding.ids
        if token_ids and token_ids[0] in self._special:
            num_begin = len(list(itertools.takewhile(bool, encoding.special_tokens_mask)))
            if token_ids[:num_begin] == token_ids[num_begin : 2 * num_begin]:
                del token_ids[:num_begin]
        return tuple(token_ids)

    def max_chars_per_token(self) -> int | None:
        """The most characters of a text that one token stands for; None if there is no bound."""
        return max_chars_per_token(self._inner)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; special tokens are left out unless they are asked for."""
        return str(self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def has_text(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """False for ids that only pad the model's vocabulary, and for special tokens skipped."""
        if skip_special_tokens and token_id in self._special:
            return False
        return bool(self._inner.id_to_token(token_id))

    def special_text(self, token_id: int) -> str:
        """What a special token is called; "" for all other tokens."""
        return self._inner.id_to_token(token_id) or "" if token_id in self._special else ""

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token such as <0x0A> stands for; None for all others."""
        return self._byte_of.get(token_id)

    def detokenizer(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> "Detokenizer":
        """For an answer to `prompt_token_ids`."""
        return Detokenizer(self, prompt_token_ids, skip_special_tokens=skip_special_tokens)


def _byte_tokens(inner: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Ids of <0x00> to <0xFF> if the decoder takes them for bytes, else ()."""
    token_ids = [inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    if None in token_ids:
        return ()
    known = tuple(token_id for token_id in token_ids if token_id is not None)
    probe = "é"
    text = inner.decode([known[byte] for byte in probe.encode()], skip_special_tokens=False)
    return known if text == probe else ()


class Detokenizer:
    """One answer's tokens to text, as it continues its prompt.

    All that `push` and `flush` return is what `Tokenizer.decode` of prompt and answer has beyond
    that of the prompt. A character that the prompt leaves incomplete belongs to the answer if the
    answer completes it.

    A decoder treats a token by those before it (leading spaces, characters cut into bytes), so
    each push decodes a short window that ends with the new token. Its text is out, but for what
    may yet become a character. A window that has grown long is shortened from the front, so a
    push costs the same however long the answer is:

        prompt prompt | out out out out out out new
                        window ───────────────────▶

    Byte-fallback tokens enter the window as whole characters, because the decoder shows a run of
    them as nothing but replacement characters if one byte in it is wrong, even characters that
    are out already. Here a wrong byte spoils only itself, as in SentencePiece.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self.skips_special_tokens = skip_special_tokens
        self._units: list[tuple[int, ...]] = []  # the window: tokens, and characters of bytes
        self._out = ""  # the part of the window's text that is out
        self._held = ""  # the rest of it, which may yet become a character
        self._cut_bytes = b""  # of byte-fallback tokens: the beginning of a character
        self._prompt_rest = ""
        texts = (token_id for token_id in reversed(prompt_token_ids) if self._has_text(token_id))
        for token_id in reversed(list(itertools.islice(texts, _NUM_KEPT_UNITS))):
            self._push(token_id)
        self._prompt_rest = _REPLACEMENT * len(self._cut_bytes) + self._held

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; often one word, "" within a character."""
        return self._without_prompt(self._push(token_id))

    def flush(self) -> str:
        """Return what is left of a character that never became whole."""
        left = self._extend(self._take_characters(is_last=True)) + self._held
        self._out, self._held = self._out + self._held, ""
        return self._without_prompt(left)

    def special_text(self, token_id: int) -> str:
        """What a special token is called; "" for all other tokens."""
        return self._tokenizer.special_text(token_id)

    def _has_text(self, token_id: int) -> bool:
        return self._tokenizer.has_text(token_id, skip_special_tokens=self.skips_special_tokens)

    def _push(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        byte = self._tokenizer.byte_of(token_id)
        if byte is None:
            return self._extend([*self._take_characters(is_last=True), (token_id,)])
        self._cut_bytes += bytes([byte])
        return self._extend(self._take_characters())

    def _take_characters(self, *, is_last: bool = False) -> list[tuple[int, ...]]:
        """Units for the characters in `_cut_bytes`, one replacement character for a wrong byte.

        What may yet become a character stays there, unless `is_last`.
        """
        units: list[tuple[int, ...]] = []
        while self._cut_bytes:
            try:
                character, num_bytes = codecs.utf_8_decode(self._cut_bytes, "strict", is_last)
            except UnicodeDecodeError:
                character, num_bytes = _REPLACEMENT, 1
            if num_bytes == 0:
                break
            self._cut_bytes = self._cut_bytes[num_bytes:]
            units.append(tuple(self._tokenizer.byte_tokens[byte] for byte in character.encode()))
        return units

    def _extend(self, units: list[tuple[int, ...]]) -> str:
        """Put `units` at the window's end; returns the text that this lets out."""
        if not units:
            return ""
        self._units += units
        text = self._decode_window()
        # An incomplete character shows as one replacement character, however many bytes it has.
        is_cut = text.endswith(_REPLACEMENT) and not self._tokenizer.byte_tokens
        self._held = _REPLACEMENT if is_cut else ""
        shown = text.removesuffix(self._held)
        new = shown[_num_common(shown, self._out) :]
        if not self._out.startswith(shown):
            self._out = shown
        if len(self._units) > _MAX_UNITS:
            self._units = self._units[-_NUM_KEPT_UNITS:]
            self._out = self._decode_window().removesuffix(self._held)
        return new

    def _decode_window(self) -> str:
        token_ids = list(itertools.chain.from_iterable(self._units))
        return self._tokenizer.decode(token_ids, skip_special_tokens=self.skips_special_tokens)

    def _without_prompt(self, text: str) -> str:
        """`text` without what was left over from the prompt and never became a character."""
        if text:
            text, self._prompt_rest = text.removeprefix(self._prompt_rest), ""
        return text


def _num_common(text: str, out: str) -> int:
    """Characters of `text` that are out; a decoder may take back what is (text clean-up)."""
    if text.startswith(out):
        return len(out)
    pairs = zip(text, out, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
