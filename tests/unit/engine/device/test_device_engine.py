"""A whole engine on the simulated device answers as the one of the CPU does."""

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.domain.engine_spec import StepPath
from pdserve.domain.errors import LocalFault, Reason
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch, StepLimits
from pdserve.engine.device.decode_graphs import batch_sizes
from pdserve.engine.tokenizer import Tokenizer
from pdserve.engine.torch_engine import TorchEngine
from pdserve.models import DEMO_MODEL_DIR
from tests.support.sim_device import SIM, SimRuntime
from tests.support.tiny_models import save_tiny_model

TOKENIZER = Tokenizer.load(DEMO_MODEL_DIR)
BLOCK_SIZE, BLOCKS_PER_REQUEST, CHUNK, NUM_NEW_TOKENS = 8, 8, 16, 12
LIMITS = StepLimits(max_num_requests=3, max_num_tokens=24)
REQUESTS = [
    ("import os\nimport sys\n\n\ndef add(left, right):\n    return", SamplingParams()),
    ("class Point:\n    def __init__(self", SamplingParams(temperature=1.0, seed=7)),
    ("for", SamplingParams(temperature=0.8, top_p=0.9, seed=5, min_tokens=4)),
    ("def main():\n", SamplingParams(temperature=1.2, top_k=40, seed=2**63 + 1)),
    ("return", SamplingParams(logprobs=3)),
]


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


def serve(engine: TorchEngine) -> tuple[list[list[SampledToken]], list[StepPath]]:
    """Chunks, decodes and late prompts in mixed batches; at most five requests at once."""
    running = [
        Running(
            known=list(TOKENIZER.encode(text)),
            params=params,
            table=tuple(BlockId(8 * place + 7 - block) for block in range(BLOCKS_PER_REQUEST)),
            joins_at=2 * place,
        )
        for place, (text, params) in enumerate(REQUESTS)
    ]
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
