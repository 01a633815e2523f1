from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from pdserve.domain.errors import LocalFault
from pdserve.engine.tokenizer import Tokenizer
from pdserve.models import DEMO_MODEL_DIR
from tests.support.tiny_tokenizers import TinyTokenizer, tiny_tokenizer

TOKENIZER = Tokenizer.load(DEMO_MODEL_DIR)
TEXTS = st.text(alphabet=st.sampled_from("ab \n_(){}=é漢字🙂👩‍👧.09"), max_size=60)


def pieces(token_ids: tuple[int, ...] | list[int]) -> list[str]:
    detokenizer = TOKENIZER.detokenizer()
    return [detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()]


def test_encode_adds_the_begin_token() -> None:
    assert TOKENIZER.encode("def")[0] == 0
    assert TOKENIZER.decode(TOKENIZER.encode("def f(x):")) == "def f(x):"


def test_begin_token_is_left_off_if_asked() -> None:
    assert TOKENIZER.encode("def", add_special_tokens=False) == TOKENIZER.encode("def")[1:]


@pytest.mark.parametrize("adds", [True, False])
def test_text_that_begins_with_the_begin_token_gets_no_second_one(adds: bool) -> None:
    bare = TOKENIZER.encode("def", add_special_tokens=False)
    typed = "<|begin_of_text|>"
    assert TOKENIZER.encode(f"{typed}def", add_special_tokens=adds) == (0, *bare)
    assert TOKENIZER.encode(f"{typed}{typed}def", add_special_tokens=adds) == (0, 0, *bare)
    assert TOKENIZER.encode(f"def{typed}")[-1] == 0  # a marker elsewhere stays


def test_begin_of_several_tokens_is_not_doubled_either() -> None:
    inner = tiny_tokenizer("byte level").inner
    inner = tokenizers.Tokenizer.from_str(inner.to_str())
    ids = {text: inner.token_to_id(text) for text in ("<s>", "</s>")}
    inner.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A <s>", special_tokens=list(ids.items())
    )
    begin, end = ids.values()
    tokenizer, text = Tokenizer(inner, b""), ord("a")
    assert tokenizer.encode("<s></s>a") == tokenizer.encode("a") == (begin, end, text, begin)
    assert tokenizer.encode("</s>a") == (begin, end, end, text, begin)
    assert tokenizer.encode("") == (begin, end, begin)


@pytest.mark.parametrize("name", ["fallback, stripped", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "text"), [(["▁the"], " world"), (["▁the", "</s>"], " world"), (["<s>"], "world")]
)
def test_answer_has_the_space_that_parts_it_from_the_prompt(
    name: str, prompt: list[str], text: str
) -> None:
    tiny = tiny_tokenizer(name)
    detokenizer = tiny.tokenizer.detokenizer([tiny.id_of(each) for each in prompt])
    assert detokenizer.push(tiny.id_of("▁world")) == text


@pytest.mark.parametrize("name", ["byte level", "fallback"])
def test_character_that_the_prompt_began_is_the_answers_if_that_completes_it(name: str) -> None:
    tiny = tiny_tokenizer(name)
    first, *rest = bytes_of(tiny, "日")
    detokenizer = tiny.tokenizer.detokenizer([first])
    assert [detokenizer.push(token_id) for token_id in rest] == ["", "日"]
    detokenizer = tiny.tokenizer.detokenizer([first])
    assert detokenizer.push(tiny.id_of("a")) + detokenizer.flush() == "a"
    assert tiny.tokenizer.detokenizer([first]).flush() == ""


def test_wrong_byte_takes_no_character_back() -> None:
    tiny = tiny_tokenizer("fallback")
    detokenizer = tiny.tokenizer.detokenizer()
    token_ids = [*bytes_of(tiny, "日"), tiny.id_of("<0xFF>"), *bytes_of(tiny, "é")]
    given = [detokenizer.push(token_id) for token_id in token_ids]
    assert given == ["", "", "日", "\ufffd", "", "é"]


def bytes_of(tiny: TinyTokenizer, text: str) -> list[int]:
    spelt = "<0x{:02X}>" if tiny.name == "fallback" else None
    return [tiny.id_of(spelt.format(byte)) if spelt else byte for byte in text.encode()]


@given(text=TEXTS)
def test_pushed_text_is_the_text_that_was_encoded(text: str) -> None:
    assert "".join(pieces(TOKENIZER.encode(text))) == text


@given(token_ids=st.lists(st.integers(0, 2100), max_size=40))
def test_pushes_and_flush_are_the_decoded_whole_for_any_tokens(token_ids: list[int]) -> None:
    known = [token_id for token_id in token_ids if TOKENIZER.has_text(token_id)]
    assert "".join(pieces(token_ids)) == TOKENIZER.decode(known)


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    token_ids = TOKENIZER.encode("漢")[1:]
    assert len(token_ids) > 1
    assert pieces(token_ids) == [""] * (len(token_ids) - 1) + ["漢", ""]


def test_unfinished_character_comes_out_with_the_flush() -> None:
    first = TOKENIZER.encode("漢")[1]
    assert pieces([first]) == ["", "\ufffd"]


def test_special_tokens_and_ids_past_the_vocabulary_have_no_text() -> None:
    assert pieces([0, 1, TOKENIZER.vocab_size + 5]) == ["", "", "", ""]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match=r"cannot read .*tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)


def test_corrupt_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(LocalFault, match=r"not a valid tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_digest_follows_the_content(tmp_path: Path) -> None:
    content = (DEMO_MODEL_DIR / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content)
    assert Tokenizer.load(tmp_path).digest == TOKENIZER.digest
    (tmp_path / "tokenizer.json").write_text(content + "\n")
    assert Tokenizer.load(tmp_path).digest != TOKENIZER.digest
    assert len(TOKENIZER.digest) == 16
