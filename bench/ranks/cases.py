"""The steps that are measured."""

from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch

CONTEXT = 256
CASES = {"prefill 512": 3, "decode 1": 15, "decode 16": 15, "decode 64": 10}
"""What is in a step, and how many steps are measured in a round."""
NUM_BLOCKS = 64 * (CONTEXT // 16) + 32


def batch_of(case: str, spec: EngineSpec) -> StepBatch:
    """`prefill N`: a prompt of N tokens; `decode N`: a token each for N requests."""
    kind, size = case.split()
    if kind == "prefill":
        return StepBatch((_sequence(spec, 0, int(size), 0, token_index=0),))
    return StepBatch(
        tuple(_sequence(spec, CONTEXT - 1, 1, row, token_index=1) for row in range(int(size)))
    )


def _sequence(
    spec: EngineSpec, start: int, num_tokens: int, row: int, *, token_index: int
) -> SequenceStep:
    num_blocks = spec.layout.num_blocks_for(start + num_tokens)
    return SequenceStep(
        token_ids=tuple((row + place) % spec.vocab_size for place in range(num_tokens)),
        start=start,
        block_table=tuple(BlockId(row * num_blocks + block) for block in range(num_blocks)),
        sample=SampleStep(params=SamplingParams(), token_index=token_index),
    )
