"""Text that streams against one decode of everything, for every family of tokenizers."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import (
    REPLACEMENT,
    SPECIALS,
    TINY_TOKENIZERS,
    TinyTokenizer,
    byte_alphabet,
    tiny_tokenizer,
)

families = st.sampled_from(TINY_TOKENIZERS).map(tiny_tokenizer)


@st.composite
def token_lists(draw: st.DrawFn, tiny: TinyTokenizer, max_size: int) -> list[int]:
    """Any tokens; special ones and ids beyond the vocabulary among them."""
    plain = st.integers(0, tiny.num_plain - 1)
    odd = st.sampled_from([*map(tiny.id_of, SPECIALS), tiny.tokenizer.vocab_size + 3])
    spelt = st.text(alphabet="日本é🙂 a", max_size=12).map(lambda text: _bytes_of(tiny, text))
    pieces = st.one_of(plain.map(lambda each: [each]), odd.map(lambda each: [each]), spelt)
    return [each for piece in draw(st.lists(pieces, max_size=max_size)) for each in piece]


def _bytes_of(tiny: TinyTokenizer, text: str) -> list[int]:
    """`text` a byte a token, if the family has tokens for bytes."""
    if tiny.name.startswith("fallback"):
        return [tiny.id_of(f"<0x{byte:02X}>") for byte in text.encode()]
    return list(text.encode()) if tiny.name == "byte level" else []


def beyond(before: str, whole: str) -> str:
    """What `whole` has beyond `before`; a cut character at its end may have become whole."""
    same = (before.removesuffix(REPLACEMENT * num) for num in range(4))
    return whole.removeprefix(next(each for each in same if whole.startswith(each)))


@given(data=st.data(), tiny=families, skips=st.booleans())
@settings(max_examples=600, deadline=None)
def test_streamed_text_is_the_decoded_whole_beyond_the_prompt(
    data: st.DataObject, tiny: TinyTokenizer, skips: bool
) -> None:
    prompt = data.draw(token_lists(tiny, 12), "prompt")
    answer = data.draw(token_lists(tiny, 40), "answer")
    detokenizer = tiny.tokenizer.detokenizer(prompt, skip_special_tokens=skips)
    before, text = tiny.whole(prompt, skip_special_tokens=skips), ""
    for count, token_id in enumerate(answer, start=1):
        text += detokenizer.push(token_id)
        due = beyond(before, tiny.whole(prompt + answer[:count], skip_special_tokens=skips))
        held = due.removeprefix(text)
        assert due.startswith(text), (due, text)
        # No more than the beginning of one character waits.
        assert held in (REPLACEMENT * num for num in range(4 if tiny.cuts else 1)), (due, text)
    text += detokenizer.flush()
    assert text == beyond(before, tiny.whole(prompt + answer, skip_special_tokens=skips))


@pytest.mark.parametrize("name", ["byte level", "fallback, stripped", "fallback"])
def test_no_real_character_is_lost_however_long_tokens_straddle(name: str) -> None:
    tiny = tiny_tokenizer(name)
    text = "日本語のテキスト" * 40
    detokenizer = tiny.tokenizer.detokenizer()
    token_ids = straddling(tiny, text)
    assert "".join(map(detokenizer.push, token_ids)) + detokenizer.flush() == text


def straddling(tiny: TinyTokenizer, text: str) -> list[int]:
    """Tokens that all end inside a character but the last; bytes if the family has only those."""
    if tiny.name != "byte level":
        return _bytes_of(tiny, text)
    data, alphabet = text.encode(), byte_alphabet()
    pieces = [data[:1], *(data[at : at + 3] for at in range(1, len(data), 3))]
    return [tiny.id_of("".join(alphabet[byte] for byte in piece)) for piece in pieces]


class CountingTokenizer(Tokenizer):
    """Remembers how many tokens each decode took."""

    sizes: list[int]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.sizes.append(len(token_ids))
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("name", TINY_TOKENIZERS)
@pytest.mark.parametrize("kind", ["straddling", "garbage", "spaces", "words"])
def test_a_token_costs_the_same_however_long_the_answer(name: str, kind: str) -> None:
    tiny = tiny_tokenizer(name)
    tokenizer = CountingTokenizer(tiny.inner, b"")
    tokenizer.sizes = []
    token_ids = {
        "straddling": straddling(tiny, "日本語のテキスト" * 100),
        "garbage": _bytes_of(tiny, "é" * 900)[::2],
        "spaces": [tiny.id_of("▁▁")] * 900 if "▁▁" in tiny.inner.get_vocab() else [],
        "words": [tiny.num_plain - 1, 7] * 450,
    }[kind]
    detokenizer = tokenizer.detokenizer([5] * 2000)
    text = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
    assert text == beyond(tiny.whole([5] * 2000), tiny.whole([*([5] * 2000), *token_ids]))
    assert max(tokenizer.sizes) <= 52  # 12 units and a character, each of up to 4 bytes
    assert len(tokenizer.sizes) <= 1.5 * len(token_ids) + 16
