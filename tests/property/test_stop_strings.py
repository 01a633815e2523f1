"""Answers that end at stop strings, against a search of the whole text for every prefix."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from decode_worker.stream import Answer
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import FinishReason
from pdserve.engine.tokenizer import Tokenizer

LETTERS = "ab<>\n"
WORDS = ["".join(letters) for size in (1, 2, 3) for letters in product(LETTERS, repeat=size)]
SPECIALS = ("<ab>", "<ba>", "<end>")
EOS = len(WORDS) + 2
"""The last of `SPECIALS`, which come after the words."""
ACROSS = f"a{SPECIALS[1]}ba"
STOP_ID = 0
"""The first of `WORDS`, in the answers that stop there."""


def _tokenizer() -> Tokenizer:
    vocab = {word: token_id for token_id, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return Tokenizer(inner, b"")


TOKENIZER = _tokenizer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What the client has at the end: `finish` None means that the answer goes on."""

    text: str
    num_tokens: int
    finish: FinishReason | None


def shown_by_answer(token_ids: Sequence[int], params: SamplingParams) -> Shown:
    answer = Answer(
        params,
        eos_token_ids=(EOS,),
        detokenizer=TOKENIZER.detokenizer(skip_special_tokens=params.skip_special_tokens),
    )
    text = ""
    for token_id in token_ids:
        piece = answer.push(token_id)
        text += piece.text
        if piece.finish is not None:
            return Shown(text=text, num_tokens=answer.num_tokens, finish=piece.finish)
    return Shown(text=text, num_tokens=answer.num_tokens, finish=None)


def shown_by_search(token_ids: Sequence[int], params: SamplingParams) -> Shown:
    """Every prefix searched as a whole; tokens before `min_tokens` only give text."""
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    before = ""
    characters: list[tuple[str, bool]] = []  # and whether the client gets it
    for index, token_id in enumerate(token_ids):
        is_special = token_id >= len(WORDS)
        spelt = SPECIALS[token_id - len(WORDS)] if is_special else WORDS[token_id]
        can_stop = index >= params.min_tokens
        is_stop = can_stop and token_id in stop_ids
        is_text = not (is_special and params.skip_special_tokens)
        if is_stop and not params.include_stop_str_in_output:
            is_text, spelt = False, spelt if is_special else ""
        if can_stop:
            characters += [(character, is_text) for character in spelt]
        elif is_text:
            before += spelt
        text = "".join(character for character, is_text in characters if is_text)
        seen = "".join(character for character, _ in characters)
        cuts = [(text.find(stop), stop) for stop in params.stop]
        for stop in params.stop:
            place = seen.find(stop)
            num_text = sum(is_text for _, is_text in characters[: max(place, 0)])
            cuts.append((num_text if place >= 0 else -1, stop))
        cuts = [(place, stop) for place, stop in cuts if place >= 0]
        if cuts:
            place, stop = min(cuts, key=lambda cut: (cut[0], len(cut[1])))
            end = stop if params.include_stop_str_in_output else ""
            return Shown(
                text=before + text[:place] + end, num_tokens=index + 1, finish=FinishReason.STOP
            )
        if is_stop or index + 1 == params.max_tokens:
            finish = FinishReason.STOP if is_stop else FinishReason.LENGTH
            return Shown(text=before + text, num_tokens=index + 1, finish=finish)
    return Shown(text=before + text, num_tokens=len(token_ids), finish=None)


words = st.integers(1, len(WORDS) - 1)
specials = st.integers(len(WORDS), EOS)
letters = st.integers(1, len(LETTERS) - 1)
kinds = st.one_of(words, letters, letters, specials, st.just(STOP_ID))
answers = st.lists(kinds, min_size=1, max_size=16)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    token_ids = draw(answers)
    seen = TOKENIZER.decode(token_ids, skip_special_tokens=False)
    cut = st.tuples(st.integers(0, len(seen) - 1), st.integers(1, 14))
    from_answer = cut.map(lambda place: seen[place[0] : sum(place)])
    anything = st.text(alphabet=LETTERS, min_size=1, max_size=4)
    max_tokens = draw(st.integers(1, 20))
    return token_ids, SamplingParams(
        stop=tuple(draw(st.lists(from_answer | anything, max_size=3))),
        stop_token_ids=draw(st.sampled_from([(), (), (STOP_ID,), (EOS - 1,)])),
        max_tokens=max_tokens,
        min_tokens=draw(st.just(0) | st.integers(0, max_tokens)),
        ignore_eos=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
    )


def word(text: str) -> int:
    return WORDS.index(text)


@given(case=cases())
@example(  # the text stops before a stop string that special tokens interrupt
    case=([word("a"), EOS - 1, word("b")], SamplingParams(max_tokens=9, stop=("ab",)))
)
@example(  # the first letter waits although special tokens come between
    case=([word("a"), *([EOS - 1] * 40), word("b")], SamplingParams(max_tokens=99, stop=("ab",)))
)
@example(  # all before a special token waits, though the text alone begins no stop string
    case=([word("a"), EOS - 1, word("b"), word("a")], SamplingParams(max_tokens=9, stop=(ACROSS,)))
)
@settings(max_examples=1000, deadline=None)
def test_answers_end_as_a_search_of_the_whole_text_says(
    case: tuple[list[int], SamplingParams],
) -> None:
    token_ids, params = case
    expected, shown = shown_by_search(token_ids, params), shown_by_answer(token_ids, params)
    if expected.finish is not None:
        assert shown == expected
        return
    assert (shown.num_tokens, shown.finish) == (expected.num_tokens, None)
    held = expected.text.removeprefix(shown.text)
    assert expected.text.startswith(shown.text)
    assert len(held) < max([len(stop) for stop in params.stop], default=1)


@given(
    text=st.text(alphabet=LETTERS, min_size=1, max_size=24),
    place=st.integers(0, 23),
    length=st.integers(1, 8),
    sizes=st.lists(st.integers(1, 3), min_size=24, max_size=24),
    is_included=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_stop_string_is_found_wherever_tokens_begin_and_end(
    text: str, place: int, length: int, sizes: list[int], is_included: bool
) -> None:
    stop = text[place % len(text) :][:length]
    token_ids, rest = [], text
    for size in sizes:
        if rest:
            token_ids.append(word(rest[:size]))
            rest = rest[size:]
    params = SamplingParams(max_tokens=99, stop=(stop,), include_stop_str_in_output=is_included)
    shown = shown_by_answer(token_ids, params)
    before = text[: text.find(stop)]
    assert shown.text == before + (stop if is_included else "")
    assert shown.finish is FinishReason.STOP
