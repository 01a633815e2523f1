import io
import json
import sys

import pytest

from pdserve.cli.generating import (
    Question,
    answer_as_json,
    printable,
    read_prompt,
    render_logprobs,
    render_timeline,
)
from pdserve.client.values import Chunk, Sampling
from pdserve.domain.errors import LocalFault
from pdserve.domain.tokens import Finished, FinishReason, PhaseTimeline, SampledToken, Usage


def question(prompt: str, *, is_token_ids: bool = False) -> Question:
    return Question(prompt=prompt, sampling=Sampling(), is_token_ids=is_token_ids)


class FakeStdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", FakeStdin("gr\u00fc\u00dfe\n".encode()))
    assert read_prompt(question("-")) == "gr\u00fc\u00dfe\n"


def test_input_that_is_not_utf8_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", FakeStdin(b"secret \xff"))
    with pytest.raises(LocalFault) as caught:
        read_prompt(question("-"))
    assert caught.value.message == "standard input is not UTF-8 text (byte 7)"
    with pytest.raises(LocalFault, match="the prompt is not UTF-8"):
        read_prompt(question("secret \udcff"))


def test_token_ids_may_be_separated_by_spaces_or_commas() -> None:
    assert read_prompt(question("5, 17 99", is_token_ids=True)) == [5, 17, 99]
    with pytest.raises(LocalFault, match="expected whole numbers"):
        read_prompt(question("5 x", is_token_ids=True))


def finished(timeline: PhaseTimeline, cached: int = 0) -> Finished:
    usage = Usage(prompt_tokens=10, completion_tokens=4, cached_prompt_tokens=cached, seed=7)
    return Finished(reason=FinishReason.LENGTH, usage=usage, timeline=timeline)


def test_json_of_an_answer_has_no_number_that_json_lacks() -> None:
    """Routers of other versions may send what ours never do."""
    nan, inf = float("nan"), float("inf")
    end = finished(PhaseTimeline(total_s=nan, ttft_s=inf))
    tokens = (SampledToken(3, -0.5, ((3, -0.5), (4, -inf))), SampledToken(5, nan))
    chunk = Chunk(request_id="r", first_index=0, tokens=tokens, text="a", finished=end)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(answer_as_json([chunk], end), parse_constant=refuse)
    assert content["tokens"] == [
        {"id": 3, "logprob": -0.5, "top": [[3, -0.5], [4, None]]},
        {"id": 5, "logprob": None, "top": []},
    ]
    assert (content["timeline"]["total_s"], content["timeline"]["ttft_s"]) == (None, None)
    assert content["finish_reason"] == "length"


def test_timeline_places_each_phase_where_it_happened() -> None:
    timeline = PhaseTimeline(
        prefill_s=0.1,
        transfer_s=0.05,
        handoff_wait_s=0.1,
        decode_s=0.2,
        ttft_s=0.1,
        total_s=0.4,
        prefill_worker="prefill-0",
        decode_worker="decode-1",
        transferred_bytes=4096,
    )
    heading, *lines = render_timeline(finished(timeline)).splitlines()
    assert "10 + 4 tokens, ended by length" in heading
    assert "prefill-0 -> decode-1" in heading
    bars = {line[:17].strip(): line[30:70] for line in lines}
    assert bars["prefill"].rstrip() == "█" * 10
    assert bars["handoff wait"].rstrip() == " " * 10 + "█" * 10
    assert bars["decode"] == " " * 20 + "█" * 20
    assert bars["(KV transfer"].rstrip() == " " * 15 + "░" * 5
    assert "4,096 bytes" in lines[-1]


def test_timeline_of_an_instant_answer_is_still_drawn() -> None:
    text = render_timeline(finished(PhaseTimeline(decode_worker="decode-0"), cached=8))
    assert "8 of 10 prompt tokens were in a prefix cache" in text


def test_logprobs_have_a_line_for_each_token() -> None:
    tokens = [SampledToken(5, -0.25, ((5, -0.25), (6, -1.5))), SampledToken(6)]
    _, first, second = render_logprobs(tokens).splitlines()
    assert first.split() == ["0", "5", "-0.250", "5", "-0.250", "6", "-1.500"]
    assert second.split() == ["1", "6"]


def test_terminals_get_no_escape_sequences_from_a_model() -> None:
    assert printable("a\tb\n\x1b[2J\x07 \u009bz") == "a\tb\n\\x1b[2J\\x07 \\x9bz"
