"""One request must not harm another: a step that raises is run again, sequence by sequence."""

import structlog

from pdserve.domain.errors import Reason
from pdserve.domain.tokens import Failed
from pdserve.engine.contract import Drawn, Engine, StepBatch, StepResult
from pdserve.observe.watch import WorkerWatch

log = structlog.get_logger(__name__)


async def run_step(engine: Engine, batch: StepBatch, watch: WorkerWatch) -> StepResult:
    """Run the batch; whatever the engine raises becomes the failure of the sequences that raise.

    A step that raised may have written a part of its KV. Each sequence writes the same to the same
    places again, so the second passage, of as many steps as there are sequences, is safe. A
    sequence fails even if it was not to be sampled: its KV is not there. `watch` counts steps by
    how they were launched, the step that raised and each row that failed.
    """
    try:
        result = await engine.step(batch)
        watch.step_launched(result.path)
    except Exception as error:
        log.error("step.failed", num_requests=len(batch.sequences), exc_info=error)
        watch.step_failed()
        if len(batch.sequences) > 1:
            result = await _one_by_one(engine, batch, watch)
        else:
            result = StepResult((_failed(),) * len(batch.sequences), 0.0)
    tell_of_failed_rows(result, watch)
    return result


def tell_of_failed_rows(result: StepResult, watch: WorkerWatch) -> None:
    for drawn in result.sampled:
        if isinstance(drawn, Failed):
            watch.row_failed(drawn.reason)


async def _one_by_one(engine: Engine, batch: StepBatch, watch: WorkerWatch) -> StepResult:
    sampled: list[Drawn | None] = []
    elapsed_s = 0.0
    for sequence in batch.sequences:
        try:
            result = await engine.step(StepBatch((sequence,)))
        except Exception as error:
            log.error("sequence.failed", num_tokens=len(sequence.token_ids), exc_info=error)
            sampled.append(_failed())
        else:
            watch.step_launched(result.path)
            sampled += result.sampled
            elapsed_s += result.elapsed_s
    return StepResult(tuple(sampled), elapsed_s)


def _failed() -> Failed:
    return Failed(reason=Reason.INTERNAL, message="the engine failed on this request")
