import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random

import pytest

from pdserve.domain.ids import BlockId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.timed_engine import TimedEngine
from tests.support.timed_oracle import timed_tokens

BLOCK_SIZE = 8
FILES = ModelFiles.open("demo")
INSTANT = StepCoefficients(
    fixed_s=0.0,
    prefill_token_s=0.0,
    prefill_attention_s=0.0,
    decode_token_s=0.0,
    decode_context_token_s=0.0,
)
PROMPT = tuple(Random(2).randrange(2, 2000) for _ in range(37))
TABLE = tuple(BlockId(block) for block in (9, 3, 14, 0, 7, 5, 12))


def open_timed(coefficients: StepCoefficients = INSTANT, **changes: object) -> TimedEngine:
    return TimedEngine(
        FILES,
        block_size=BLOCK_SIZE,
        num_blocks=16,
        coefficients=coefficients,
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture
async def engine() -> AsyncIterator[TimedEngine]:
    opened = open_timed()
    yield opened
    opened.close()


def share(
    token_ids: tuple[int, ...],
    start: int,
    index: int | None,
    params: SamplingParams | None = None,
    table: tuple[BlockId, ...] = TABLE,
) -> SequenceStep:
    sample = None
    if index is not None:
        sample = SampleStep(params=params or SamplingParams(), token_index=index)
    return SequenceStep(token_ids=token_ids, start=start, block_table=table, sample=sample)


async def prefill(engine: TimedEngine, chunk: int, table: tuple[BlockId, ...] = TABLE) -> int:
    for start in range(0, len(PROMPT), chunk):
        part = PROMPT[start : start + chunk]
        index = 0 if start + chunk >= len(PROMPT) else None
        result = await engine.step(StepBatch((share(part, start, index, table=table),)))
    [token] = result.sampled
    assert isinstance(token, SampledToken)
    return token.token_id


async def decode(
    engine: TimedEngine, first: int, num: int, params: SamplingParams | None = None
) -> tuple[int, ...]:
    output = [first]
    for index in range(1, num):
        step = share((output[-1],), len(PROMPT) + index - 1, index, params)
        [token] = (await engine.step(StepBatch((step,)))).sampled
        assert isinstance(token, SampledToken)
        output.append(token.token_id)
    return tuple(output)


@pytest.mark.parametrize("chunk", [1, 7, 8, 13, 37])
async def test_tokens_are_the_oracles_for_any_chunking(engine: TimedEngine, chunk: int) -> None:
    output = await decode(engine, await prefill(engine, chunk), 15)
    assert output == timed_tokens(PROMPT, 15, spec=engine.spec)


async def test_prompts_in_one_batch_do_not_mix(engine: TimedEngine) -> None:
    other = tuple(BlockId(block) for block in (1, 2, 4, 6, 8))
    batch = StepBatch((share(PROMPT, 0, 0), share(PROMPT[::-1], 0, 0, table=other)))
    first, second = (await engine.step(batch)).sampled
    assert isinstance(first, SampledToken)
    assert isinstance(second, SampledToken)
    assert (first.token_id,) == timed_tokens(PROMPT, 1, spec=engine.spec)
    assert (second.token_id,) == timed_tokens(PROMPT[::-1], 1, spec=engine.spec)


async def test_another_engine_continues_from_copied_blocks(engine: TimedEngine) -> None:
    first = await prefill(engine, 13)
    other = open_timed()
    for block in TABLE:
        other.kv.block(block)[:] = engine.kv.block(block)
    assert await decode(other, first, 10) == timed_tokens(PROMPT, 10, spec=engine.spec)
    other.close()


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("part", range(2))
async def test_torn_block_changes_the_tokens(engine: TimedEngine, layer: int, part: int) -> None:
    first = await prefill(engine, 37)
    layout = engine.spec.layout
    size = layout.layer_offset_bytes(1) // 2
    start = layout.layer_offset_bytes(layer) + part * size
    engine.kv.block(TABLE[1])[start : start + size] = bytes(size)
    assert await decode(engine, first, 2) != timed_tokens(PROMPT, 2, spec=engine.spec)


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(range(4), 2)))
async def test_swapped_blocks_change_the_tokens(engine: TimedEngine, left: int, right: int) -> None:
    first = await prefill(engine, 37)
    blocks = [engine.kv.block(TABLE[place]) for place in (left, right)]
    blocks[0][:], blocks[1][:] = bytes(blocks[1]), bytes(blocks[0])
    assert await decode(engine, first, 2) != timed_tokens(PROMPT, 2, spec=engine.spec)


async def test_seed_matters_only_above_temperature_zero(engine: TimedEngine) -> None:
    def tokens(temperature: float, seed: int) -> tuple[int, ...]:
        params = SamplingParams(temperature=temperature, seed=seed)
        return timed_tokens(PROMPT, 8, spec=engine.spec, params=params)

    assert tokens(0, 1) == tokens(0, 2)
    assert tokens(1, 1) != tokens(1, 2)


async def test_end_tokens_are_never_drawn_and_stop_tokens_not_before_min_tokens(
    engine: TimedEngine,
) -> None:
    stop = timed_tokens(PROMPT, 3, spec=engine.spec)[2:]
    params = SamplingParams(min_tokens=4, stop_token_ids=stop)
    output = timed_tokens(PROMPT, 200, spec=engine.spec, params=params)
    assert not set(output) & set(engine.spec.eos_token_ids)
    assert stop[0] not in output[:4]


async def test_logprobs_come_with_alternatives(engine: TimedEngine) -> None:
    step = share(PROMPT, 0, 0, SamplingParams(logprobs=3))
    [token] = (await engine.step(StepBatch((step,)))).sampled
    assert isinstance(token, SampledToken)
    assert token.logprob is not None
    assert len(token.top_logprobs) == 3


async def test_steps_take_the_predicted_time_one_after_the_other() -> None:
    coefficients = StepCoefficients(
        fixed_s=0.02,
        prefill_token_s=0.001,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    )
    engine = open_timed(coefficients)
    batch = StepBatch((share(PROMPT[:10], 0, None),))
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    results = await asyncio.gather(engine.step(batch), engine.step(batch))
    assert loop.time() - began_s >= 0.06
    assert [result.elapsed_s for result in results] == pytest.approx([0.03, 0.03])
    engine.close()


async def test_cancelled_step_writes_nothing() -> None:
    slow = StepCoefficients(
        fixed_s=0.05,
        prefill_token_s=0.0,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    )
    engine = open_timed(slow)
    task = asyncio.create_task(engine.step(StepBatch((share(PROMPT, 0, 0),))))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.06)
    assert not any(engine.kv.bytes)
    engine.close()


async def test_small_layout_can_stand_in_for_the_models_own() -> None:
    layout = KvLayout(
        layers=(LayerKv(1, 2, 4),) * 2, block_size=BLOCK_SIZE, dtype="float32", item_bytes=4
    )
    engine = open_timed(layout=layout)
    assert await decode(engine, await prefill(engine, 13), 6) == timed_tokens(
        PROMPT, 6, spec=engine.spec
    )
    assert engine.kv.num_bytes == 16 * 2 * BLOCK_SIZE * 6 * 4
    engine.close()


def test_small_vocabulary_gives_as_many_alternatives_as_it_has(engine: TimedEngine) -> None:
    """The timed engine looks for tokens until it has enough; it must not look for ever."""
    spec = replace(engine.spec, vocab_size=4, eos_token_ids=(0,))
    drawn = timed_tokens(PROMPT, 9, spec=spec, params=SamplingParams(logprobs=20))
    assert set(drawn) <= {1, 2, 3}
    nothing = replace(spec, eos_token_ids=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="leave no token"):
        timed_tokens(PROMPT, 1, spec=nothing)


async def test_layers_that_are_told_of_are_written_and_later_ones_are_not(
    engine: TimedEngine,
) -> None:
    layout, num_layers = engine.spec.layout, len(engine.spec.layout.layers)
    ends = [layout.layer_offset_bytes(layer) for layer in range(num_layers + 1)]
    block = engine.kv.block(TABLE[0])
    told: list[tuple[int, bytes]] = []
    batch = StepBatch((share(PROMPT, 0, 0),), lambda count: told.append((count, bytes(block))))
    result = await engine.step(batch)
    assert [count for count, _ in told] == list(range(1, num_layers + 1))
    for count, seen in told:
        assert seen[: ends[count]] == block[: ends[count]]
        assert not any(seen[ends[count] :])
    assert result.sampled == (await engine.step(StepBatch((share(PROMPT, 0, 0),)))).sampled
