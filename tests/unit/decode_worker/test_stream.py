"""Answers: text, stops and limits; and outputs joined into messages."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.stream import Answer, RouterOutbox
from pdserve.domain.ids import RequestId
from pdserve.domain.messages import RequestOutput, StepOutputs
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import FinishReason
from pdserve.rpc.streams import MAX_NUM_BUFFERED_MESSAGES, memory_stream_pair
from tests.support.worker_pair import demo_tokenizer

EOS = 1
TEXT_IDS = [token_id for token_id in range(3, 400) if demo_tokenizer().has_text(token_id)]


def push_all(token_ids: Sequence[int], **sampling: object) -> tuple[str, int, FinishReason | None]:
    """Text, number of tokens taken, and how the answer ended."""
    answer = Answer(
        SamplingParams(**{"max_tokens": 64, **sampling}),  # type: ignore[arg-type]
        eos_token_ids=(EOS,),
        detokenizer=demo_tokenizer().detokenizer(
            skip_special_tokens=bool(sampling.get("skip_special_tokens", True))
        ),
    )
    text = ""
    for token_id in token_ids:
        piece = answer.push(token_id)
        text += piece.text
        if piece.finish is not None:
            return text, answer.num_tokens, piece.finish
    return text, answer.num_tokens, None


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(token_id for token_id in demo_tokenizer().encode(text) if token_id != EOS)


def test_stop_string_across_tokens_is_cut_out_of_the_text() -> None:
    token_ids = ids_of("for line in open(path):\n    print(line)")
    whole = demo_tokenizer().decode(token_ids)
    first = len(demo_tokenizer().decode(token_ids[:2]))
    stop = whole[first - 1 : first + 3]  # begins in one token, ends in a later one
    text, num_tokens, finish = push_all(token_ids, stop=(stop,))
    assert text == whole[: whole.find(stop)]
    assert finish is FinishReason.STOP
    assert 2 < num_tokens < len(token_ids)


def test_text_held_for_a_stop_that_never_comes_is_let_out() -> None:
    token_ids = ids_of("return x")
    whole = demo_tokenizer().decode(token_ids)
    stop = whole[-1] + "?"
    text, _, finish = push_all(token_ids, stop=(stop,))
    assert (text, finish) == (whole[:-1], None)  # the last one could begin the stop
    text, _, finish = push_all(token_ids, stop=(stop,), max_tokens=len(token_ids))
    assert (text, finish) == (whole, FinishReason.LENGTH)


@pytest.mark.parametrize("token_id", [EOS, 77])
def test_end_and_stop_tokens_end_the_answer_without_text(token_id: int) -> None:
    token_ids = (*ids_of("a b"), token_id, *ids_of("c"))
    text, num_tokens, finish = push_all(token_ids, stop_token_ids=(77,))
    assert text == demo_tokenizer().decode(ids_of("a b"))
    assert (num_tokens, finish) == (len(ids_of("a b")) + 1, FinishReason.STOP)


def test_ignored_end_token_leaves_only_the_limit() -> None:
    token_ids = (EOS, EOS, *ids_of("a b c d"))
    _, num_tokens, finish = push_all(token_ids, ignore_eos=True, max_tokens=4)
    assert (num_tokens, finish) == (4, FinishReason.LENGTH)


def test_nothing_stops_before_min_tokens() -> None:
    token_ids = (EOS, 77, EOS)
    _, num_tokens, finish = push_all(token_ids, min_tokens=2, stop_token_ids=(77,))
    assert (num_tokens, finish) == (3, FinishReason.STOP)


def test_stop_at_the_last_allowed_token_is_a_stop() -> None:
    token_ids = ids_of("one two")
    stop = demo_tokenizer().decode(token_ids)[-2:]
    _, _, finish = push_all(token_ids, stop=(stop,), max_tokens=len(token_ids))
    assert finish is FinishReason.STOP


BEGIN, BEGIN_TEXT, EOS_TEXT = 0, "<|begin_of_text|>", "<|end_of_text|>"
A_B = demo_tokenizer().encode("a b", add_special_tokens=False)
HAS_SPECIAL = (*A_B, BEGIN, *demo_tokenizer().encode("c", add_special_tokens=False))


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (BEGIN_TEXT, "a b"),
        ("begin_of", "a b"),
        (f" b{BEGIN_TEXT}", "a"),
        (f"{BEGIN_TEXT}c", "a b"),
        (f"b{BEGIN_TEXT}c", "a "),
        ("bc", "a "),
    ],
)
@pytest.mark.parametrize("is_included", [False, True])
def test_a_special_token_is_a_stop_string_alone_and_within_text(
    stop: str, text: str, is_included: bool
) -> None:
    shown, _, finish = push_all(
        (*HAS_SPECIAL, *ids_of("d")), stop=(stop,), include_stop_str_in_output=is_included
    )
    assert (shown, finish) == (text + (stop if is_included else ""), FinishReason.STOP)


def test_special_token_that_ends_a_stop_string_ends_the_answer_at_once() -> None:
    _, num_tokens, _ = push_all(HAS_SPECIAL, stop=(BEGIN_TEXT,))
    assert num_tokens == len(A_B) + 1


def test_special_tokens_are_text_only_if_they_are_not_skipped() -> None:
    options = {"max_tokens": len(HAS_SPECIAL)}
    assert push_all(HAS_SPECIAL, **options)[0] == "a bc"
    shown = push_all(HAS_SPECIAL, skip_special_tokens=False, **options)[0]
    assert shown == f"a b{BEGIN_TEXT}c"


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({}, "a b"),
        ({"include_stop_str_in_output": True}, "a b"),
        ({"skip_special_tokens": False}, "a b"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, f"a b{EOS_TEXT}"),
        ({"include_stop_str_in_output": True, "stop": (EOS_TEXT,)}, f"a b{EOS_TEXT}"),
        ({"stop": (f" b{EOS_TEXT}",)}, "a"),
    ],
)
def test_end_token_is_shown_if_it_is_asked_for(sampling: dict[str, object], text: str) -> None:
    shown, num_tokens, finish = push_all((*A_B, EOS, *A_B), **sampling)
    assert (shown, num_tokens, finish) == (text, len(A_B) + 1, FinishReason.STOP)


def test_stop_token_that_has_text_is_shown_if_it_is_asked_for() -> None:
    token_ids = (*A_B, 77, *A_B)
    included = {"stop_token_ids": (77,), "include_stop_str_in_output": True}
    assert push_all(token_ids, **included)[0] == demo_tokenizer().decode((*A_B, 77))


@given(
    token_ids=st.lists(st.sampled_from(TEXT_IDS), min_size=1, max_size=24),
    places=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), max_size=3),
    max_tokens=st.integers(1, 30),
)
@settings(max_examples=200, deadline=None)
def test_pieces_joined_are_the_tokens_decoded_and_cut_at_the_first_stop(
    token_ids: list[int], places: list[tuple[int, int]], max_tokens: int
) -> None:
    decode = demo_tokenizer().decode
    whole = decode(token_ids)
    stops = tuple(
        whole[first : first + length]
        for first, length in places
        if whole[first : first + length] and "\ufffd" not in whole[first : first + length]
    )
    text, num_tokens, finish = push_all(token_ids, stop=stops, max_tokens=max_tokens)
    taken = decode(token_ids[:num_tokens])
    found = [taken.find(stop) for stop in stops if stop in taken]
    if found:
        assert (text, finish) == (taken[: min(found)], FinishReason.STOP)
    elif num_tokens == max_tokens:
        assert (text, finish) == (taken, FinishReason.LENGTH)
    else:
        assert finish is None
        assert taken.startswith(text)
    for earlier in range(num_tokens):
        before = decode(token_ids[:earlier]).rstrip("\ufffd")
        assert not any(stop in before for stop in stops), "it could have stopped earlier"


def output(name: str) -> RequestOutput:
    return RequestOutput(request_id=RequestId(name), attempt=1, first_index=0)


async def test_outputs_of_one_turn_are_one_message_in_order() -> None:
    stream, router = memory_stream_pair()
    outbox = RouterOutbox(stream)
    outbox.add(output("a"))
    outbox.add(output("b"))
    assert await router.receive() == StepOutputs((output("a"), output("b")))
    outbox.add(output("c"))
    assert await router.receive() == StepOutputs((output("c"),))


async def test_router_that_does_not_read_loses_its_stream() -> None:
    stream, _ = memory_stream_pair()
    outbox = RouterOutbox(stream)
    for _ in range(MAX_NUM_BUFFERED_MESSAGES):
        assert stream.try_send(StepOutputs(()))
    assert stream.try_send(StepOutputs(())) is False
    receiving = asyncio.create_task(stream.receive())
    outbox.add(output("a"))
    async with asyncio.timeout(1):
        await asyncio.wait([receiving])
    assert receiving.exception() is not None
