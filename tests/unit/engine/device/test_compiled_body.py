"""Compiled layers compute what they do as they are, with as few codes as there are at load."""

import asyncio
import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch, StepLimits
from pdserve.engine.device import compiled_body
from pdserve.engine.device.compiled_body import INDUCTOR
from pdserve.engine.device.runtime import HOST
from pdserve.engine.torch_engine import TorchEngine
from tests.support.tiny_models import save_tiny_model

BLOCK_SIZE, BLOCKS_PER_REQUEST = 8, 8
LIMITS = StepLimits(max_num_requests=3, max_num_tokens=24)
TRACED = "aot_eager"
"""Traces and lowers as inductor does, and runs torch's own operators."""
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def traces_are_not_logged() -> Iterator[None]:
    """They are as long as the code, and whoever keeps the log of a test would keep them."""
    logger = logging.getLogger("torch.__trace")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before


def open_engine(model: Path, compiler: str | None) -> TorchEngine:
    return TorchEngine.load(
        model, block_size=BLOCK_SIZE, num_blocks=32, device=HOST, limits=LIMITS, compiler=compiler
    )


def save(kind: str, folder: Path) -> Path:
    save_tiny_model(kind, folder)
    return folder


def step(place: int, start: int, length: int) -> SequenceStep:
    first = place * BLOCKS_PER_REQUEST
    return SequenceStep(
        token_ids=tuple((7 * place + 3 * at) % 160 for at in range(start, start + length)),
        start=start,
        block_table=tuple(BlockId(first + each) for each in reversed(range(BLOCKS_PER_REQUEST))),
        sample=SampleStep(params=SamplingParams(), token_index=0),
    )


def batches() -> Iterator[StepBatch]:
    """Prompts in chunks, decodes of one to three requests, and both together."""
    yield StepBatch((step(0, 0, 13),))
    yield StepBatch((step(0, 13, 1),))
    yield StepBatch((step(0, 14, 1), step(1, 0, 9)))
    yield StepBatch((step(0, 15, 1), step(1, 9, 1)))
    yield StepBatch((step(0, 16, 8), step(1, 10, 14), step(2, 0, 2)))
    yield StepBatch((step(0, 24, 1), step(1, 24, 1), step(2, 2, 1)))


def num_codes(engine: TorchEngine) -> int:
    stepper: Any = engine._stepper
    return int(stepper._backend.codes.num_made)


def compare(plain: TorchEngine, compiled: TorchEngine) -> None:
    for batch in batches():
        logits = [engine._model.forward(batch) for engine in (plain, compiled)]
        torch.testing.assert_close(logits[1], logits[0], rtol=TOLERANCE, atol=TOLERANCE)
        results = [engine.compute(batch) for engine in (plain, compiled)]
        assert results[0].sampled == results[1].sampled
        assert results[0].path is results[1].path


def check(kind: str, folder: Path, compiler: str) -> None:
    model = save(kind, folder)
    plain, compiled = open_engine(model, None), open_engine(model, compiler)
    compare(plain, compiled)
    for batch in batches():
        in_its_thread = asyncio.run(compiled.step(batch))
        assert in_its_thread.sampled == plain.compute(batch).sampled
    assert num_codes(compiled) == 2
    weights = weakref.ref(next(compiled._model._model.parameters()))
    plain.close()
    compiled.close()
    del compiled
    gc.collect()
    assert weights() is None, "what is closed gives its memory back"


def test_compiled_layers_compute_the_same_in_any_batch_and_thread(tmp_path: Path) -> None:
    check("llama", tmp_path, TRACED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *("llama4_text", "gemma2", "gpt_oss", "gpt2", "mixtral", "deepseek_v3", "opt", "biogpt"),
        *("gpt_neox", "cohere", "nemotron", "qwen3_moe", "llama/longrope"),
    ],
)
def test_models_of_many_kinds_compute_the_same(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path, TRACED)


@pytest.mark.slow
def test_kernels_of_inductor_compute_the_same(tmp_path: Path) -> None:
    check("llama", tmp_path, INDUCTOR)


def test_a_model_that_cannot_be_compiled_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Its code asks how long the longest request is."""
    with pytest.raises(LocalFault) as caught:
        open_engine(save("phimoe/longrope", tmp_path), TRACED)
    assert "compile: model type phimoe cannot be compiled (" in caught.value.message
    assert "or set compile to false" in caught.value.message


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("g++ is not there")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: fails)
    with pytest.raises(LocalFault, match=r"llama cannot be compiled \(.*g\+\+ is not there"):
        open_engine(save("llama", tmp_path), INDUCTOR)


@pytest.mark.slow
def test_code_that_serves_one_number_of_rows_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_body, "_NUM_CODES", 1)
    with pytest.raises(LocalFault, match="it takes 2 compilations for three passes"):
        open_engine(save("llama", tmp_path), TRACED)


def test_the_host_and_parts_of_models_are_not_compiled(tmp_path: Path) -> None:
    model = save("llama", tmp_path)
    with pytest.raises(LocalFault, match="compile: only whole models on a device"):
        TorchEngine.load(model, block_size=8, num_blocks=8, compiler=TRACED)
