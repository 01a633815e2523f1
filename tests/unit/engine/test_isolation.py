"""A step that raises costs only the sequences that raise."""

import pytest
import structlog

from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import Reason
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.contract import Drawn, SampleStep, SequenceStep, StepBatch, StepResult
from pdserve.engine.isolation import run_step
from pdserve.engine.kv_memory import KvMemory
from pdserve.observe.watch import WorkerWatch

GUILTY, UNUSABLE = 13, 14


class Engine:
    """Draws the number of the sequence's token plus 1; raises for the guilty one."""

    spec: EngineSpec
    kv: KvMemory
    looks_ahead = False

    def __init__(self) -> None:
        self.sizes: list[int] = []

    async def step(self, batch: StepBatch) -> StepResult:
        self.sizes.append(len(batch.sequences))
        return StepResult(tuple(map(self._run, batch.sequences)), 0.5)

    def _run(self, sequence: SequenceStep) -> Drawn | None:
        [token] = sequence.token_ids
        if token == GUILTY:
            raise IndexError("a prompt that must not leak")
        if token == UNUSABLE:
            return Failed(reason=Reason.UNUSABLE_LOGITS, message="NaN")
        return SampledToken(token + 1) if sequence.sample else None

    def close(self) -> None: ...


class Watch(WorkerWatch):
    def __init__(self) -> None:
        self.failed: list[str] = []

    def step_failed(self) -> None:
        self.failed.append("step")

    def row_failed(self, reason: str) -> None:
        self.failed.append(reason)


def batch_of(*tokens: int, samples: bool = True) -> StepBatch:
    sample = SampleStep(params=SamplingParams(), token_index=0) if samples else None
    return StepBatch(
        tuple(
            SequenceStep(token_ids=(token,), start=0, block_table=(BlockId(0),), sample=sample)
            for token in tokens
        )
    )


async def test_guilty_sequence_fails_alone() -> None:
    engine, watch = Engine(), Watch()
    with structlog.testing.capture_logs() as logs:
        result = await run_step(engine, batch_of(1, GUILTY, 3), watch)
    first, failed, third = result.sampled
    assert (first, third) == (SampledToken(2), SampledToken(4))
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.INTERNAL
    assert "prompt" not in failed.message
    assert engine.sizes == [3, 1, 1, 1]
    assert result.elapsed_s == 1.0
    assert result.num_tokens == 2
    assert watch.failed == ["step", "INTERNAL"]
    assert [entry["event"] for entry in logs] == ["step.failed", "sequence.failed"]


async def test_guilty_chunk_fails_though_it_samples_nothing() -> None:
    with structlog.testing.capture_logs():
        result = await run_step(Engine(), batch_of(1, GUILTY, samples=False), Watch())
    assert result.sampled[0] is None
    assert isinstance(result.sampled[1], Failed)


async def test_lone_sequence_is_not_run_again() -> None:
    engine = Engine()
    with structlog.testing.capture_logs():
        result = await run_step(engine, batch_of(GUILTY), Watch())
    assert isinstance(result.sampled[0], Failed)
    assert engine.sizes == [1]


@pytest.mark.parametrize("tokens", [(1, UNUSABLE), (UNUSABLE, GUILTY)])
async def test_failures_of_rows_are_counted_by_reason(tokens: tuple[int, ...]) -> None:
    watch = Watch()
    with structlog.testing.capture_logs():
        await run_step(Engine(), batch_of(*tokens), watch)
    assert watch.failed.count("UNUSABLE_LOGITS") == 1
    assert watch.failed.count("INTERNAL") == int(GUILTY in tokens)
