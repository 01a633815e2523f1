"""Batches and drawn tokens survive the way between ranks, bit for bit."""

import asyncio
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.domain.errors import Reason
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.contract import Drawn, SampleStep, SequenceStep, StepBatch
from pdserve.engine.ranks.batch_codec import batch_message, batch_of, drawn_message, drawn_of
from pdserve.engine.ranks.frames import Message, frame, read_frame

TOKENS = st.integers(0, 2**31 - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.001, 1),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(1, 10**6),
    min_tokens=st.integers(0, 10),
    stop_token_ids=st.lists(TOKENS, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
SEQUENCES = st.builds(
    SequenceStep,
    token_ids=st.lists(TOKENS, min_size=1, max_size=40).map(tuple),
    start=st.integers(0, 10**6),
    block_table=st.lists(st.integers(0, 10**6).map(BlockId), max_size=20).map(tuple),
    sample=st.none() | st.builds(SampleStep, params=PARAMS, token_index=st.integers(0, 10**6)),
    num_tokens=st.integers(0, 10**6),
)
LOGPROBS = st.floats(-1e6, 0) | st.just(-math.inf)
DRAWN = st.one_of(
    st.none(),
    st.builds(SampledToken, TOKENS),
    st.builds(
        SampledToken, TOKENS, LOGPROBS, st.lists(st.tuples(TOKENS, LOGPROBS), max_size=3).map(tuple)
    ),
    st.builds(Failed, reason=st.sampled_from(Reason), message=st.text(max_size=20)),
)


def travelled(message: Message) -> Message:
    async def read() -> Message:
        reader = asyncio.StreamReader()
        reader.feed_data(frame({"fields": message.fields}, message.body))
        head, body = await read_frame(reader)
        return Message(head["fields"], body)

    return asyncio.run(read())


@settings(deadline=None)
@given(st.lists(SEQUENCES, max_size=8))
def test_batch_is_the_same_on_every_rank(sequences: list[SequenceStep]) -> None:
    batch = StepBatch(tuple(sequences))
    assert batch_of(travelled(batch_message(batch))) == batch


def test_stop_strings_stay_at_rank_0() -> None:
    params = SamplingParams(stop=("secret",), include_stop_str_in_output=True)
    step = SequenceStep(
        token_ids=(1,),
        start=0,
        block_table=(BlockId(0),),
        sample=SampleStep(params=params, token_index=0),
    )
    message = batch_message(StepBatch((step,)))
    assert "secret" not in str(message.fields)
    [got] = batch_of(message).sequences
    assert got.sample is not None
    assert got.sample.params == SamplingParams()


@settings(deadline=None)
@given(st.lists(DRAWN, max_size=8))
def test_drawn_tokens_are_the_same_at_rank_0(drawn: list[Drawn | None]) -> None:
    assert drawn_of(travelled(drawn_message(drawn))) == tuple(drawn)
