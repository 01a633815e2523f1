from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.errors import LocalFault
from pdserve.engine.tokenizer import Tokenizer
from pdserve.models import DEMO_MODEL_DIR

TOKENIZER = Tokenizer.load(DEMO_MODEL_DIR)
TEXTS = st.text(alphabet=st.sampled_from("ab \n_(){}=é漢字🙂👩‍👧.09"), max_size=60)


def pieces(token_ids: tuple[int, ...] | list[int]) -> list[str]:
    detokenizer = TOKENIZER.detokenizer()
    return [detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()]


def test_encode_adds_the_begin_token() -> None:
    assert TOKENIZER.encode("def")[0] == 0
    assert TOKENIZER.decode(TOKENIZER.encode("def f(x):")) == "def f(x):"


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
