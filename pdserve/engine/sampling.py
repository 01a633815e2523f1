"""Draws tokens from logits so that a draw depends only on its own request.

A sampled token is the arg max of `logits / temperature + noise` over the tokens that top-k and
top-p leave (the Gumbel-max trick: Maddison, Tarlow, Minka, NeurIPS 2014, section 2). The noise of a
token comes from a counter, (seed, token index, token id), so nothing has to be remembered between
steps, and the rounding of logits, which varies with the batch, decides only between two scores that
are equal to seven digits. Inverting the cumulative distribution instead would meet such a tie at
each of its many steps.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import SampleStep
from pdserve.engine.mixing import GOLDEN, mix, mix_ints

Floats = npt.NDArray[np.float64]


def draw_tokens(
    logits: npt.NDArray[np.float32], steps: Sequence[SampleStep], eos_token_ids: Sequence[int]
) -> list[SampledToken]:
    """Draw one token for each row. `logits`: [rows, vocabulary], of the untempered model."""
    if all(_is_plain(step) for step in steps):
        return [SampledToken(token_id) for token_id in logits.argmax(axis=1).tolist()]
    return [_draw(row, step, eos_token_ids) for row, step in zip(logits, steps, strict=True)]


def _is_plain(step: SampleStep) -> bool:
    params = step.params
    is_greedy = params.temperature == 0 and params.logprobs is None
    return is_greedy and step.token_index >= params.min_tokens


def _draw(
    row: npt.NDArray[np.float32], step: SampleStep, eos_token_ids: Sequence[int]
) -> SampledToken:
    params = step.params
    allowed = row.astype(np.float64)
    if step.token_index < params.min_tokens:
        allowed[[*eos_token_ids, *params.stop_token_ids]] = -np.inf
    if params.temperature == 0:
        token_id = int(allowed.argmax())
    else:
        token_id = _sample(allowed, params, step.token_index)
    if params.logprobs is None:
        return SampledToken(token_id)
    logprobs = _log_softmax(row.astype(np.float64))
    best = _largest(logprobs, params.logprobs)
    top = tuple((int(other), float(logprobs[other])) for other in best)
    return SampledToken(token_id, float(logprobs[token_id]), top)


def _sample(logits: Floats, params: SamplingParams, token_index: int) -> int:
    candidates = np.flatnonzero(logits > -np.inf)
    if 0 < params.top_k < len(candidates):
        candidates = _largest(logits, params.top_k)
    scores = logits[candidates] / params.temperature
    if params.top_p < 1:
        kept = _nucleus(scores, params.top_p)
        candidates, scores = candidates[kept], scores[kept]
    noise = gumbel_noise(params.seed, token_index, candidates)
    return int(candidates[(scores + noise).argmax()])


def _nucleus(scores: Floats, top_p: float) -> npt.NDArray[np.intp]:
    """The fewest likeliest tokens whose probabilities reach `top_p` (Holtzman et al., 2020)."""
    order = np.argsort(-scores, kind="stable")
    probabilities = np.exp(_log_softmax(scores[order]))
    before = np.cumsum(probabilities) - probabilities
    return order[before < top_p]


def _largest(values: Floats, count: int) -> npt.NDArray[np.intp]:
    """Places of the `count` largest, largest first; of equals the lowest place first."""
    if count == 0:
        return np.zeros(0, dtype=np.intp)
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    threshold = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= threshold)
    return places[np.argsort(-values[places], kind="stable")][:count]


def _log_softmax(values: Floats) -> Floats:
    shifted = values - values.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result


def gumbel_noise(seed: int, token_index: int, token_ids: npt.NDArray[np.intp]) -> Floats:
    """Standard Gumbel noise for each token id: the SplitMix64 stream of (seed, index), at id."""
    state = np.uint64(mix_ints(seed, token_index))
    with np.errstate(over="ignore"):
        bits = mix(state + (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: Floats = -np.log(-np.log(uniform))
    return noise
