"""Fitting the step time model to an engine before it serves."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdserve.config.processes import CoefficientSettings
from pdserve.domain.ids import BlockId
from pdserve.domain.latency import StepCoefficients, StepShape
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import Engine, SampleStep, SequenceStep, StepBatch

NUM_ROUNDS = 3
MAX_CALIBRATION_TOKENS = 512
CALIBRATION_BATCHES = (1, 8, 32)
MIN_DECODE_SHARE = 0.5
"""Of a prompt token's time: a decoded token is multiplied with the same weights, and sampled."""


async def measure_coefficients(
    engine: Engine, given: CoefficientSettings | None
) -> StepCoefficients:
    """What the settings give, or a short measurement (about a second for a small model).

    Overwrites KV blocks: call before any request. The fit weighs relative errors and keeps every
    coefficient at or above zero.
    """
    if given is not None:
        return given.to_coefficients()
    batches = _batches(engine)
    await engine.step(batches[0])  # warms up caches and compiled code
    times_s = await _fastest_s(engine, batches)
    terms = np.array([_terms(batch.shape()) for batch in batches])
    weights = _fit(terms / times_s[:, None], np.ones(len(times_s)))
    errors = times_s / (terms @ weights) - 1
    fixed_s, prefill_token_s, prefill_attention_s, decode_token_s, decode_context_token_s = (
        float(weight) for weight in weights
    )
    return StepCoefficients(
        fixed_s=fixed_s,
        prefill_token_s=prefill_token_s,
        prefill_attention_s=prefill_attention_s,
        # Never nothing, whatever noise says: all requests would look best on one worker.
        decode_token_s=max(decode_token_s, MIN_DECODE_SHARE * prefill_token_s),
        decode_context_token_s=decode_context_token_s,
        relative_error=float(np.sqrt(np.mean(errors**2))),
    )


def _batches(engine: Engine) -> list[StepBatch]:
    """Prompts alone, the end of a long prompt, and decode batches at short and long contexts."""
    layout = engine.spec.layout
    num_kv_tokens = engine.kv.num_blocks * layout.block_size
    longest = max(2, min(engine.spec.max_context_tokens, num_kv_tokens, MAX_CALIBRATION_TOKENS))
    batches = [
        StepBatch((_prompt(engine, start, length),))
        for start, length in ((0, longest), (0, longest // 4 or 1), (longest // 2, longest // 2))
    ]
    for batch_size in CALIBRATION_BATCHES:
        for context in (max(2, longest // 8), longest):
            fits = max(1, num_kv_tokens // (-(-context // layout.block_size) * layout.block_size))
            tokens = [_token(engine, context, i) for i in range(min(batch_size, fits))]
            batches.append(StepBatch(tuple(tokens)))
    return batches


def _prompt(engine: Engine, start: int, length: int) -> SequenceStep:
    num_blocks = engine.spec.layout.num_blocks_for(start + length)
    return SequenceStep(
        token_ids=tuple(place % engine.spec.vocab_size for place in range(length)),
        start=start,
        block_table=tuple(BlockId(block) for block in range(num_blocks)),
    )


def _token(engine: Engine, context: int, place: int) -> SequenceStep:
    num_blocks = engine.spec.layout.num_blocks_for(context)
    first = place * num_blocks
    return SequenceStep(
        token_ids=(place % engine.spec.vocab_size,),
        start=context - 1,
        block_table=tuple(BlockId(first + block) for block in range(num_blocks)),
        sample=SampleStep(params=SamplingParams(), token_index=1),  # a decode
    )


async def _fastest_s(engine: Engine, batches: Sequence[StepBatch]) -> npt.NDArray[np.float64]:
    """The least of a few runs of each: what else the machine does only ever adds.

    All batches in turn, then all again: a busy moment does not fall on every run of one of them.
    """
    rounds = [
        [(await engine.step(batch)).elapsed_s for batch in batches] for _ in range(NUM_ROUNDS)
    ]
    fastest: npt.NDArray[np.float64] = np.array(rounds).min(axis=0)
    return fastest


def _terms(shape: StepShape) -> tuple[float, ...]:
    return (
        1.0,
        shape.num_prefill_tokens,
        shape.num_prefill_pairs,
        shape.num_decodes,
        shape.num_decode_context_tokens,
    )


def _fit(
    terms: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Least squares with no negative weight: terms that would get one are left out in turn."""
    scale = np.abs(terms).max(axis=0)
    scale[scale == 0] = 1.0
    kept = list(range(terms.shape[1]))
    weights = np.zeros(terms.shape[1])
    while kept:
        solution = np.linalg.lstsq(terms[:, kept] / scale[kept], targets, rcond=None)[0]
        if (solution >= 0).all():
            weights[kept] = solution / scale[kept]
            break
        kept.pop(int(np.argmin(solution)))
    return weights
