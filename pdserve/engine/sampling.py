"""Draws tokens from logits so that a draw depends only on its own request.

A sampled token is the arg max of `logits / temperature + noise` over the tokens that top-k and
top-p leave (the Gumbel-max trick: Maddison, Tarlow, Minka, NeurIPS 2014, section 2). The noise of a
token comes from a counter, (seed, token index, token id), so nothing has to be remembered between
steps, and the rounding of logits, which varies with the batch, decides only between two scores that
are equal to seven digits. Inverting the cumulative distribution instead would meet such a tie at
each of its many steps.

A row that no token can be drawn from fails alone: its place in the result says why.
"""

from collections.abc import Sequence

import numpy as np
import structlog

from pdserve.domain.errors import Reason
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.contract import Drawn, SampleStep
from pdserve.engine.gumbel import MAX_NOISE_GAP, noisiest, random_words
from pdserve.engine.nucleus import Work, draw_from_nucleus
from pdserve.engine.ranking import Logits, largest, ranked

log = structlog.get_logger(__name__)


def draw_tokens(
    logits: Logits, steps: Sequence[SampleStep], eos_token_ids: Sequence[int]
) -> list[Drawn]:
    """Draw one token for each row. `logits`: [rows, vocabulary], of the untempered model.

    A `Failed` stands for a row without a usable logit (reason UNUSABLE_LOGITS: one is NaN or
    +infinity, or all are ruled out) and for one whose drawing raised (INTERNAL).
    """
    best = logits.argmax(axis=1)  # of a row with NaN a place of NaN, so that one look finds any
    work = Work(logits.shape[1])
    return [
        _draw_guarded(row, int(top), step, eos_token_ids, work)
        for row, top, step in zip(logits, best, steps, strict=True)
    ]


def _draw_guarded(
    row: Logits, best: int, step: SampleStep, eos_token_ids: Sequence[int], work: Work
) -> Drawn:
    if not np.isfinite(row[best]):
        return token_or_failure(None, step)
    try:
        return _draw(row, best, step, eos_token_ids, work)
    except Exception as error:
        log.error("row.failed", token_index=step.token_index, exc_info=error)
        return Failed(reason=Reason.INTERNAL, message="the engine failed to draw a token")


def token_or_failure(token_id: int | None, step: SampleStep) -> Drawn:
    """What was drawn for `step`; None if its row has no usable logit."""
    if token_id is None:
        return _unusable(
            f"the model's logits for output token {step.token_index} are NaN or infinite"
        )
    return SampledToken(token_id)


def _unusable(message: str) -> Failed:
    return Failed(reason=Reason.UNUSABLE_LOGITS, message=message)


def _draw(
    row: Logits, best: int, step: SampleStep, eos_token_ids: Sequence[int], work: Work
) -> Drawn:
    params, token_id, allowed = step.params, best, row
    if step.token_index < params.min_tokens:
        allowed = row.copy()
        allowed[[*eos_token_ids, *params.stop_token_ids]] = -np.inf
        token_id = int(allowed.argmax())
        if allowed[token_id] == -np.inf:
            return _unusable("min_tokens rules out every token that the model allows")
    if not params.is_greedy:
        token_id = _sample(allowed, float(allowed[token_id]), step, work)
    if params.logprobs is None:
        return SampledToken(token_id)
    return _with_logprobs(row, float(row[best]), token_id, params.logprobs)


def _sample(logits: Logits, top: float, step: SampleStep, work: Work) -> int:
    """Scores are relative to the largest logit, `top`, so that no temperature overflows them."""
    params, places, chosen = step.params, work.places, logits
    if 0 < params.top_k < len(logits):
        places = largest(logits, params.top_k)
        chosen = logits[places]
    scores = np.subtract(chosen, np.float64(top), out=work.scores[: len(chosen)])
    scores /= params.temperature
    # Whatever is so far below the likeliest token can neither win nor be in a nucleus.
    if scores.min() < -MAX_NOISE_GAP:
        near = np.flatnonzero(scores >= -MAX_NOISE_GAP)
        places, scores = places[near], scores[near]
    if params.top_p < 1:
        return draw_from_nucleus(places, scores, params.top_p, params.seed, step.token_index, work)
    words = random_words(params.seed, step.token_index, places, work.words)
    return int(places[noisiest(scores, words)])


def _with_logprobs(row: Logits, top: float, token_id: int, num_others: int) -> SampledToken:
    """Tokens that the model rules out (-infinity) are not among the others."""
    total = top + np.log(np.exp(row.astype(np.float64) - top).sum())
    others = ((int(place), float(row[place]) - total) for place in ranked(row, num_others))
    listed = tuple((place, logprob) for place, logprob in others if logprob > -np.inf)
    return SampledToken(token_id, float(row[token_id]) - total, listed)
