"""What the timed engine must say, without steps, batches or KV memory."""

from collections.abc import Sequence

from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed
from pdserve.engine.contract import SampleStep
from pdserve.engine.timed_engine import _advance, _draw, _fold, _seed, _tags


def timed_tokens(
    prompt: Sequence[int], num: int, *, spec: EngineSpec, params: SamplingParams | None = None
) -> tuple[int, ...]:
    """The first `num` output tokens for `prompt`, straight from the definition."""
    params = params or SamplingParams()
    token_ids = list(prompt)
    num_tags = 2 * len(spec.layout.layers)
    for index in range(num):
        tags = _tags(_advance(_seed(spec), token_ids), num_tags)
        drawn = _draw(spec, _fold(tags), SampleStep(params=params, token_index=index))
        if isinstance(drawn, Failed):
            raise ValueError(drawn.message)
        token_ids.append(drawn.token_id)
    return tuple(token_ids[len(prompt) :])
