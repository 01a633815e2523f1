"""A whole engine on the simulated device answers as the one of the CPU does."""

import asyncio
import contextlib
import gc
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_worker.decode_loop import DecodeLoop
from decode_worker.requests import DecodeRequest
from decode_worker.stream import Answer, RouterOutbox
from pdserve.domain.engine_spec import StepPath
from pdserve.domain.errors import LocalFault, Reason
from pdserve.domain.ids import BlockId, RequestId
from pdserve.domain.invariants import BrokenInvariant
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import Submit
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch, StepLimits
from pdserve.engine.device.decode_graphs import batch_sizes
from pdserve.engine.step_table import StepTable
from pdserve.engine.tokenizer import Tokenizer
from pdserve.engine.torch_engine import TorchEngine
from pdserve.models import DEMO_MODEL_DIR
from pdserve.observe.watch import DecodeWatch
from pdserve.rpc.streams import memory_stream_pair
from tests.support.sim_device import SIM, SimRuntime
from tests.support.tiny_models import save_tiny_model

TOKENIZER = Tokenizer.load(DEMO_MODEL_DIR)
BLOCK_SIZE, BLOCKS_PER_REQUEST, CHUNK, NUM_NEW_TOKENS = 8, 8, 16, 12
NO_TIME = StepCoefficients(
    fixed_s=0,
    prefill_token_s=0,
    prefill_attention_s=0,
    decode_token_s=0,
    decode_context_token_s=0,
)
LIMITS = StepLimits(max_num_requests=3, max_num_tokens=24)
REQUESTS = [
    ("import os\nimport sys\n\n\ndef add(left, right):\n    return", SamplingParams()),
    ("class Point:\n    def __init__(self", SamplingParams(temperature=1.0, seed=7)),
    ("for", SamplingParams(temperature=0.8, top_p=0.9, seed=5, min_tokens=4)),
    ("def main():\n", SamplingParams(temperature=1.2, top_k=40, seed=2**63 + 1)),
    ("return", SamplingParams(logprobs=3)),
]
DRAWN_ON_DEVICE = [REQUESTS[place] for place in (0, 1, 3)]


@dataclass
class Running:
    known: list[int]
    params: SamplingParams
    table: tuple[BlockId, ...]
    joins_at: int
    num_computed: int = 0
    tokens: list[SampledToken] = field(default_factory=list)

    def next_step(self) -> SequenceStep:
        end = min(self.num_computed + CHUNK, len(self.known))
        sample = SampleStep(params=self.params, token_index=len(self.tokens))
        return SequenceStep(
            token_ids=tuple(self.known[self.num_computed : end]),
            start=self.num_computed,
            block_table=self.table,
            sample=sample if end == len(self.known) else None,
            num_tokens=len(self.known),
        )

    def step_after(self, step: SequenceStep | None, place: int) -> SequenceStep:
        """What comes after a step under way, whose draw, if there is one, has that place."""
        if step is None:
            return self.next_step()
        computed = step.start + len(step.token_ids)
        if step.sample is None:
            return replace(self, num_computed=computed).next_step()
        index = step.sample.token_index + 1
        return SequenceStep(
            token_ids=(0,),
            start=computed,
            block_table=self.table,
            sample=SampleStep(params=self.params, token_index=index),
            num_tokens=computed + 1,
            follows=place,
        )


def new_requests(requests: Sequence[tuple[str, SamplingParams]]) -> list[Running]:
    return [
        Running(
            known=list(TOKENIZER.encode(text)),
            params=params,
            table=tuple(BlockId(8 * place + 7 - block) for block in range(BLOCKS_PER_REQUEST)),
            joins_at=2 * place,
        )
        for place, (text, params) in enumerate(requests)
    ]


def serve(engine: TorchEngine) -> tuple[list[list[SampledToken]], list[StepPath]]:
    """Chunks, decodes and late prompts in mixed batches; at most five requests at once."""
    running = new_requests(REQUESTS)
    paths, step = [], 0
    while any(len(each.tokens) < NUM_NEW_TOKENS for each in running):
        active = [
            each for each in running if each.joins_at <= step and len(each.tokens) < NUM_NEW_TOKENS
        ]
        step += 1
        batch = StepBatch(tuple(each.next_step() for each in active))
        result = engine.compute(batch)
        paths.append(result.path)
        for each, sequence, drawn in zip(active, batch.sequences, result.sampled, strict=True):
            each.num_computed += len(sequence.token_ids)
            if drawn is not None:
                assert isinstance(drawn, SampledToken)
                each.tokens.append(drawn)
                each.known.append(drawn.token_id)
    return [each.tokens for each in running], paths


def serve_ahead(
    engine: TorchEngine, requests: Sequence[tuple[str, SamplingParams]]
) -> tuple[list[list[SampledToken]], list[StepPath]]:
    """As `serve`, but each step is submitted before anybody waits for the one before it."""
    running = new_requests(requests)
    paths: list[StepPath] = []
    steps = 0
    under_way: deque[tuple[list[Running], StepBatch, Any]] = deque()

    def begin() -> None:
        nonlocal steps
        before: dict[int, tuple[SequenceStep, int]] = {}
        if under_way:
            num_drawn = 0
            for each, sequence in zip(under_way[0][0], under_way[0][1].sequences, strict=True):
                before[id(each)] = sequence, num_drawn
                num_drawn += sequence.sample is not None
        active, sequences = [], []
        for each in running:
            step, place = before.get(id(each), (None, 0))
            num_tokens = len(each.tokens) + (step is not None and step.sample is not None)
            if each.joins_at <= steps and num_tokens < NUM_NEW_TOKENS:
                active.append(each)
                sequences.append(each.step_after(step, place))
        steps += 1
        if sequences:
            batch = StepBatch(tuple(sequences))
            under_way.append((active, batch, engine._begin(batch)))

    begin()
    while under_way:
        begin()
        active, batch, begun = under_way[0]
        result = engine._end(begun)
        under_way.popleft()
        paths.append(result.path)
        for each, sequence, drawn in zip(active, batch.sequences, result.sampled, strict=True):
            each.num_computed = sequence.start + len(sequence.token_ids)
            if drawn is not None:
                assert isinstance(drawn, SampledToken)
                each.tokens.append(drawn)
                each.known.append(drawn.token_id)
    return [each.tokens for each in running], paths


def ids(answers: list[list[SampledToken]]) -> list[list[int]]:
    return [[token.token_id for token in tokens] for tokens in answers]


def open_engine(model: Path, **options: Any) -> TorchEngine:
    options = {"block_size": BLOCK_SIZE, "num_blocks": 40, "limits": LIMITS, **options}
    return TorchEngine.load(model, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", model_dir)
    return model_dir


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[SampledToken]]:
    engine = open_engine(model)
    answers, _ = serve(engine)
    engine.close()
    return answers


def test_an_engine_on_a_device_gives_the_tokens_of_the_cpu_however_late_it_is(
    model: Path, expected: list[list[SampledToken]]
) -> None:
    with SimRuntime() as runtime:
        engine = open_engine(model, device=runtime)
        SIM.num_waits = 0
        with runtime.lateness():
            answers, paths = serve(engine)
        assert SIM.num_waits == 0, "the host waits for the device, other than for its tokens"
        engine.close()
    assert ids(answers) == ids(expected)
    assert set(paths) == {StepPath.EAGER, StepPath.GRAPH}
    for token, same in zip(answers[4], expected[4], strict=True):
        assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
        assert [place for place, _ in token.top_logprobs] == [p for p, _ in same.top_logprobs]


@pytest.mark.parametrize(
    ("is_recorded", "late"), [(True, True), (False, True), (True, False)], ids=str
)
def test_steps_begun_before_the_tokens_they_follow_are_known_give_the_same(
    model: Path, expected: list[list[SampledToken]], is_recorded: bool, late: bool
) -> None:
    """A device may be as late as the events allow, and as early."""
    with SimRuntime() as runtime:
        engine = open_engine(model, device=runtime)
        assert engine.looks_ahead
        if not is_recorded:
            engine._stepper.forget()  # type: ignore[attr-defined]
        SIM.num_waits = 0
        with runtime.lateness() if late else contextlib.nullcontext():
            answers, paths = serve_ahead(engine, DRAWN_ON_DEVICE)
        assert SIM.num_waits == 0, "the host waits for the device, other than for its tokens"
        engine.close()
    assert ids(answers) == ids([expected[place] for place in (0, 1, 3)])
    assert (StepPath.GRAPH in paths) == is_recorded


async def test_a_decode_loop_that_looks_ahead_answers_as_the_cpu_does(
    model: Path, expected: list[list[SampledToken]]
) -> None:
    with SimRuntime(late=True) as runtime:
        limits = StepLimits(max_num_requests=4, max_num_tokens=24)
        engine = open_engine(model, device=runtime, limits=limits)
        pool, clock = BlockPool(40), asyncio.get_running_loop().time
        watch = NoFailures()
        loop = DecodeLoop(
            engine, coefficients=NO_TIME, max_step_tokens=24, clock=clock, watch=watch
        )
        running = asyncio.create_task(loop.run())
        answers = []
        for text, params in REQUESTS[:4]:
            table = pool.reserve(BLOCKS_PER_REQUEST)
            assert table is not None
            answers.append(decode_request(text, replace(params, max_tokens=NUM_NEW_TOKENS)))
            answers[-1].table = StepTable(table, lambda: None)
            loop.join(answers[-1])
        ends: list[asyncio.Future[Any]] = [running, asyncio.gather(*(a.finished for a in answers))]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert not running.done(), running.exception()
        running.cancel()
        await asyncio.wait([running])
        engine.close()
    tokens = [each.token_ids[each.num_prompt_tokens :] for each in answers]
    assert tokens == ids(expected[:4])


class NoFailures(DecodeWatch):
    def step_failed(self) -> None:
        raise AssertionError("a step failed")


def decode_request(text: str, sampling: SamplingParams) -> DecodeRequest:
    tokens = TOKENIZER.encode(text)
    return DecodeRequest(
        Submit(
            request_id=RequestId(text),
            attempt=1,
            prompt_token_ids=tuple(tokens),
            sampling=sampling,
            deadline_s=60.0,
            prefill_targets=(),
        ),
        answer=Answer(sampling, eos_token_ids=(), detokenizer=TOKENIZER.detokenizer()),
        outbox=RouterOutbox(memory_stream_pair()[0]),
        names=(),
        clock=asyncio.get_running_loop().time,
    )


async def test_an_engine_that_does_not_look_ahead_says_so_and_follows_nothing(model: Path) -> None:
    step = replace(new_requests(REQUESTS)[0].next_step(), token_ids=(1,), follows=0)
    with SimRuntime() as runtime:
        for options in ({}, {"device": runtime, "attention": "dense"}):
            engine = open_engine(model, **options)
            assert not engine.looks_ahead
            with pytest.raises(BrokenInvariant, match="follows no draw"):
                await engine.step(StepBatch((step,)))
            engine.close()


async def test_no_more_than_one_step_is_taken_ahead(model: Path) -> None:
    with SimRuntime() as runtime:
        engine = open_engine(model, device=runtime)
        batch = StepBatch((new_requests(REQUESTS)[0].next_step(),))
        steps = [asyncio.create_task(engine.step(batch)) for _ in range(3)]
        await asyncio.wait(steps)
        assert [type(each.exception()) for each in steps] == [
            type(None),
            type(None),
            BrokenInvariant,
        ]
        engine.close()


def test_dense_attention_serves_without_graphs(
    model: Path, expected: list[list[SampledToken]]
) -> None:
    with SimRuntime() as runtime:
        engine = open_engine(model, device=runtime, attention="dense")
        answers, paths = serve(engine)
        engine.close()
    assert ids(answers) == ids(expected)
    assert set(paths) == {StepPath.EAGER}


@pytest.mark.parametrize("name", ["phimoe", "gpt2", "llama/dynamic"])
def test_models_that_can_or_cannot_be_recorded_are_served(name: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path)
    engine = open_engine(tmp_path)
    expected, _ = serve(engine)
    engine.close()
    with SimRuntime() as runtime:
        engine = open_engine(tmp_path, device=runtime)
        answers, paths = serve(engine)
        engine.close()
    assert ids(answers) == ids(expected)
    assert (StepPath.GRAPH in paths) == (name == "gpt2")


def test_a_row_of_bad_numbers_fails_alone(model: Path) -> None:
    with SimRuntime() as runtime:
        engine = open_engine(model, device=runtime)
        steps = []
        for place, params in enumerate((SamplingParams(), SamplingParams(temperature=1.0))):
            sample = SampleStep(params=params, token_index=1)
            table = (BlockId(place),)
            steps.append(
                SequenceStep(token_ids=(9 + place,), start=0, block_table=table, sample=sample)
            )
        good = engine.compute(StepBatch(tuple(steps)))
        with torch.no_grad():
            engine._model._model.get_input_embeddings().weight[10].fill_(torch.nan)
        for batch in (tuple(steps), tuple(steps[::-1])):
            drawn = engine.compute(StepBatch(batch)).sampled
            bad = drawn[batch.index(steps[1])]
            assert isinstance(bad, Failed)
            assert bad.reason is Reason.UNUSABLE_LOGITS
            assert drawn[batch.index(steps[0])] == good.sampled[0]
        assert engine.compute(StepBatch(())).sampled == ()
        engine.close()


def test_blocks_fill_the_share_of_the_memory_that_steps_leave(model: Path) -> None:
    total, fraction = 256 << 20, 0.5
    with SimRuntime(total_bytes=total) as runtime:
        engine = open_engine(model, device=runtime, num_blocks=None, memory_fraction=fraction)
        kv_bytes = engine.kv.num_blocks * engine.kv.layout.block_bytes
        serve(engine)
        assert SIM.memory.most <= fraction * total
        assert kv_bytes > 0.2 * total
        engine.close()


def test_too_many_blocks_are_refused_with_how_many_there_can_be(model: Path) -> None:
    with SimRuntime(total_bytes=128 << 20) as runtime:
        gc.collect()
        try:
            open_engine(model, device=runtime, num_blocks=90_000)
        except LocalFault as error:
            message = str(error)
    assert message.startswith("num_blocks 90000: so many KV blocks")
    room = int(message.partition("room for ")[2].partition(".")[0])
    gc.collect()
    with SimRuntime(total_bytes=128 << 20) as runtime:
        engine = open_engine(model, device=runtime, num_blocks=room * 9 // 10)
        serve(engine)
        engine.close()


def test_weights_that_do_not_fit_are_refused_with_what_would(model: Path) -> None:
    told = pytest.raises(LocalFault, match=r"weights take .* GiB .* dtype bfloat16 takes half")
    with SimRuntime(total_bytes=1 << 20) as runtime, told:
        open_engine(model, device=runtime)


def test_steps_that_do_not_fit_are_refused(model: Path) -> None:
    limits = StepLimits(max_num_requests=512, max_num_tokens=8192)
    told = pytest.raises(LocalFault, match="too little memory for the largest step")
    with SimRuntime(total_bytes=16 << 20) as runtime, told:
        open_engine(model, device=runtime, limits=limits)


def test_closing_gives_the_memory_back(model: Path) -> None:
    with SimRuntime() as runtime:
        gc.collect()
        before = SIM.memory.used
        engine = open_engine(model, device=runtime)
        serve(engine)
        assert SIM.memory.used > before + 1_000_000
        engine.close()
        del engine
        gc.collect()
        assert SIM.memory.used == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:x"}, "device must be cpu, cuda or cuda:N; got cuda:x"),
        ({"device": "cuda"}, "device cuda:0 needs an NVIDIA GPU"),
        ({"num_blocks": None}, "num_blocks must be given for the CPU"),
    ],
)
def test_a_setting_that_cannot_be_met_is_refused(
    model: Path, options: dict[str, Any], message: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(LocalFault, match=message):
        open_engine(model, **options)


def test_an_attention_that_there_is_not_is_refused(model: Path) -> None:
    with SimRuntime() as runtime, pytest.raises(LocalFault, match="must be one of auto, triton"):
        open_engine(model, device=runtime, attention="numba")


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (24, [1, 2, 4, 8, 16, 24]),
    ],
)
def test_batch_sizes(most: int, sizes: list[int]) -> None:
    assert batch_sizes(most) == sizes
