"""Text to tokens and back, a token at a time; needs only the `tokenizers` library."""

import hashlib
from pathlib import Path

import tokenizers

from pdserve.domain.errors import LocalFault
from pdserve.engine.model_faults import check_no_pointers

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not, or not yet, a character
_MAX_HELD_TOKENS = 32


class Tokenizer:
    """A model's tokenizer.json. Immutable after loading: any thread may encode."""

    def __init__(self, inner: tokenizers.Tokenizer, digest: bytes) -> None:
        self._inner = inner
        self.digest = digest
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        added = inner.get_added_tokens_decoder()
        self._special = frozenset(id_ for id_, token in added.items() if token.special)

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

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of `text`, with what the tokenizer adds around it (a begin token, for most)."""
        return tuple(self._inner.encode(text).ids)

    def decode(self, token_ids: tuple[int, ...] | list[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        return str(self._inner.decode(list(token_ids), skip_special_tokens=True))

    def has_text(self, token_id: int) -> bool:
        """False for special tokens, and for ids that only pad the model's vocabulary."""
        return token_id not in self._special and self._inner.id_to_token(token_id) is not None

    def detokenizer(self) -> "Detokenizer":
        return Detokenizer(self)


class Detokenizer:
    """One answer's tokens to text: all that `push` and `flush` return is `decode` of all tokens.

    A decoder treats a token by its neighbours (leading spaces, characters cut into bytes), so each
    push decodes a short window: tokens whose text is out, as context, and tokens after them.

        ... out out out | context | fresh ...
                        window ──────────────▶

    A byte-fallback decoder can take back a whole run of bytes for one bad byte; text that is out
    stays out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._fresh: list[int] = []
        self._num_out = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; often one word, "" within a character."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._fresh.append(token_id)
        text = self._tokenizer.decode(self._context + self._fresh)
        is_open = text.endswith(_REPLACEMENT) and len(self._fresh) < _MAX_HELD_TOKENS
        new = self._advance(text.rstrip(_REPLACEMENT) if is_open else text)
        if not is_open:
            self._context, self._fresh = self._fresh, []
            self._num_out = len(self._tokenizer.decode(self._context))
        return new

    def flush(self) -> str:
        """Return what is left of a character that never became whole."""
        return self._advance(self._tokenizer.decode(self._context + self._fresh))

    def _advance(self, text: str) -> str:
        new = text[self._num_out :]
        self._num_out = max(self._num_out, len(text))
        return new
