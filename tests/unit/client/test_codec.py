import dataclasses
from typing import Any

import pytest

from pdserve.client.codec import (
    chunk_from_proto,
    request_to_proto,
)
from pdserve.client.values import Prompt, Sampling
from pdserve.domain.errors import BadRequest
from pdserve.domain.tokens import FinishReason, PhaseTimeline, SampledToken
from pdserve.v1 import inference_pb2, types_pb2


def test_unset_sampling_fields_stay_unset_on_the_wire() -> None:
    message = request_to_proto("hi", Sampling(), model="", request_id="")
    assert message.text == "hi"
    assert message.sampling == types_pb2.SamplingParams()
    for name in ("temperature", "top_k", "top_p", "seed", "max_tokens", "min_tokens", "logprobs"):
        assert not message.sampling.HasField(name)
    assert not message.sampling.HasField("skip_special_tokens")
    assert not message.HasField("add_special_tokens")


def test_options_that_are_on_unless_turned_off_travel_when_they_are_off() -> None:
    message = request_to_proto(
        "hi",
        Sampling(skip_special_tokens=False, include_stop_str_in_output=True),
        model="",
        request_id="",
        add_special_tokens=False,
    )
    sampling = message.sampling
    assert (sampling.skip_special_tokens, sampling.include_stop_str_in_output) == (False, True)
    assert sampling.HasField("skip_special_tokens")
    assert message.HasField("add_special_tokens")
    assert not message.add_special_tokens


def test_set_sampling_fields_travel_zero_included() -> None:
    sampling = Sampling(
        temperature=0.0, top_k=0, top_p=0.5, seed=2**64 - 1, stop=("a",), stop_token_ids=(3,)
    )
    message = request_to_proto([1, 2], sampling, model="m", request_id="r")
    assert list(message.token_ids.ids) == [1, 2]
    assert message.sampling.HasField("temperature")
    assert message.sampling.HasField("top_k")
    assert message.sampling.seed == 2**64 - 1
    assert (message.model, message.request_id) == ("m", "r")


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ("hi", Sampling(top_k=-1), "sampling.top_k"),
        ("hi", Sampling(max_tokens=2**32), "sampling.max_tokens"),
        ("hi", Sampling(seed=2**64), "sampling.seed"),
        ("hi", Sampling(stop_token_ids=(-5,)), "sampling.stop_token_ids"),
        ([1, -1], Sampling(), "prompt.token_ids"),
        ("\udcff secret", Sampling(), "prompt"),
        ("hi", Sampling(stop=("\ud800",)), "sampling.stop"),
    ],
)
def test_what_the_wire_cannot_carry_is_a_bad_request(
    prompt: Prompt, sampling: Sampling, field: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        request_to_proto(prompt, sampling, model="", request_id="")
    assert [violation.field for violation in caught.value.violations] == [field]
    assert "secret" not in caught.value.message


def test_last_chunk_carries_usage_and_every_field_of_the_timeline() -> None:
    values: dict[str, Any] = {
        field.name: "w" if field.name.endswith("worker") else index + 1
        for index, field in enumerate(dataclasses.fields(PhaseTimeline))
    }
    message = inference_pb2.GenerateChunk(
        first_index=4,
        tokens=[
            types_pb2.Token(id=7),
            types_pb2.Token(
                id=8,
                logprob=-0.5,
                top_logprobs=[types_pb2.TokenLogprob(token_id=9, logprob=-1.5)],
            ),
        ],
        text="x",
        finished=inference_pb2.Finished(
            reason=types_pb2.FINISH_REASON_LENGTH,
            usage=types_pb2.Usage(
                prompt_tokens=3, completion_tokens=6, cached_prompt_tokens=2, seed=11
            ),
            timeline=types_pb2.PhaseTimeline(**values),
        ),
    )
    chunk = chunk_from_proto(message)
    assert chunk.tokens == (SampledToken(7), SampledToken(8, -0.5, ((9, -1.5),)))
    assert chunk.finished is not None
    assert chunk.finished.reason is FinishReason.LENGTH
    assert chunk.finished.usage.seed == 11
    assert dataclasses.asdict(chunk.finished.timeline) == values


def test_chunk_in_the_middle_is_not_finished() -> None:
    assert chunk_from_proto(inference_pb2.GenerateChunk(text="x")).finished is None
