"""What a cluster does among requests that come as they like, reduced to `Serving`.

Requests of all lengths arrive at random at a few levels of load. From the answers it is known when
each worker read and decoded. Fits then say what the time of a prefill step with one prompt (least
absolute errors) and the time between first and last token (least squares) are made of:

    prefill      = step * prefill * (1 + (beside_prefill - 1) * D + beside_answer * A)
    last - first = n * step * decode * (1 + (beside_decode - 1) * P)
                 + (arrivals + landings meanwhile) / 2 * stolen_s
                 + wake_s after a pause, else half a step
                 + what the KV takes longer than the first token

where the decode workers compute for the share D of the time, with A answers more than one, and n
steps have the share P of their time beside prefill steps. What an answer adds to a step is known
from like answers in a row: here it cannot be told from what arrivals and prefill steps take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from pdserve.domain.latency import StepCoefficients, StepShape
from placement.answered import Answered
from placement.fitted_profile import Handoff, Serving
from placement.fitting import fit_non_negative, fit_typical

MIN_PROMPT_TOKENS = 96
LEVEL_S = 10.0
MIN_REQUESTS, MAX_REQUESTS = 60, 400
CLIPPED_PERCENT = 98
MIN_FITTED = 30
"""With fewer requests that can be judged the cluster is taken to serve as it answers probes."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Level:
    """Load of one run: share of the prefill workers' time by the fit, and lengths of answers."""

    prefill_share: float
    least_tokens: int
    most_tokens: int


LEVELS = (Level(0.15, 4, 64), Level(0.35, 4, 64), Level(0.12, 32, 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request of a run."""

    after_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps of like probes in a row, and what bounds them."""

    prefill: StepCoefficients
    decode: StepCoefficients
    max_step_tokens: int
    num_prefill: int  # workers
    num_decode: int
    link_token_s: float  # KV of one token on the link

    def read_s(self, prompt_tokens: int) -> float:
        """A prompt alone in one step."""
        return self.prefill.step_s(StepShape.of([(0, prompt_tokens)]))


def draw_traffic(
    level: Level, steps: Steps, *, max_context_tokens: int, max_batch: int, seed: int
) -> tuple[Sent, ...]:
    """Poisson arrivals; lengths spread evenly over their logarithm.

    No prompt needs more than one step. The rate is lower where answers would else fill the batches.
    """
    rng = Random(seed)
    most_prompt = min(max_context_tokens // 2, steps.max_step_tokens)
    least_prompt = min(MIN_PROMPT_TOKENS, most_prompt)
    most_answer = min(level.most_tokens, max_context_tokens // 4)
    least_answer = min(level.least_tokens, most_answer)
    sizes = [
        (_between(rng, least_prompt, most_prompt), _between(rng, least_answer, most_answer))
        for _ in range(MAX_REQUESTS)
    ]
    read_s = sum(steps.read_s(prompt) for prompt, _ in sizes) / len(sizes)
    answer_tokens = sum(answer for _, answer in sizes) / len(sizes)
    half = max(1, max_batch // 2)
    context = half * (least_prompt + most_prompt) // 2
    step_s = steps.decode.step_s(StepShape(num_decodes=half, num_decode_context_tokens=context))
    rate = min(
        level.prefill_share * steps.num_prefill / read_s,
        steps.num_decode * half / (answer_tokens * step_s) / 2,
    )
    num = min(MAX_REQUESTS, max(MIN_REQUESTS, int(rate * LEVEL_S)))
    sent, after_s = [], 0.0
    for prompt, answer in sizes[:num]:
        after_s += rng.expovariate(rate)
        sent.append(Sent(after_s=after_s, prompt_tokens=prompt, output_tokens=answer))
    return tuple(sent)


def fit_serving(
    answers: Sequence[Answered], steps: Steps, handoff: Handoff
) -> tuple[Serving, Handoff]:
    """Reduce the answers of all runs; `handoff` gives the link's speed, and all where they are few.

    Prompts count that were alone in their step: neither queued nor cached.
    """
    usable = [each for each in answers if each.was_handed_off and len(each.token_s) > 1]
    if len(usable) < MIN_FITTED:
        return Serving(), handoff
    seen = _Seen(usable, steps)
    prefill = seen.fit_prefill()
    handoff_s, busy_handoff_s = seen.fit_handoff()
    decode = seen.fit_decode(busy_handoff_s)
    serving = Serving(
        prefill=prefill.scale,
        decode=decode.scale,
        beside_prefill=prefill.beside,
        beside_answer=prefill.beside_answer,
        beside_decode=decode.beside,
        stolen_s=decode.stolen_s,
        wake_s=decode.wake_s,
        busy_handoff_s=busy_handoff_s,
        answer_scatter=decode.answer_scatter,
        step_scatter=decode.step_scatter,
    )
    found = Handoff(
        handoff_s=handoff_s,
        link_latency_s=max(0.0, handoff_s + decode.late_s - seen.mean_link_s),
        link_bytes_per_s=handoff.link_bytes_per_s,
    )
    return serving, found


@dataclass(frozen=True, slots=True, kw_only=True)
class _PrefillFit:
    scale: float = 1.0
    beside: float = 1.0
    beside_answer: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeFit:
    scale: float
    beside: float
    stolen_s: float
    wake_s: float
    late_s: float  # KV after the first token at the client
    answer_scatter: float
    step_scatter: float


class _Seen:
    """When what was computed, in the workers' time as far as the client can tell it."""

    def __init__(self, answers: Sequence[Answered], steps: Steps) -> None:
        self._answers = answers
        self._steps = steps
        lines = [each.finished.timeline for each in answers]
        # Half of what no worker claims is the way back.
        back_s = np.array([each.handoff_s / 2 for each in answers])
        self._sent_s = np.array([each.sent_s for each in answers])
        self._first_s = np.array([each.token_s[0] for each in answers]) - back_s
        self._last_s = np.array([each.token_s[-1] for each in answers]) - back_s
        self._prefill_s = np.array([line.prefill_s for line in lines])
        self._queued_s = np.array([line.prefill_queue_s for line in lines])
        self._reader = np.array([line.prefill_worker for line in lines])
        self._writer = np.array([line.decode_worker for line in lines])
        self._prompts = np.array([each.prompt_tokens for each in answers], float)
        self._steps_made = np.array([len(each.token_s) - 1 for each in answers], float)
        self._handoff_s = np.array([each.handoff_s for each in answers])
        self.mean_link_s = float(self._prompts.mean()) * steps.link_token_s
        self._reading = _unions(self._reader, self._first_s - self._prefill_s, self._first_s)
        self._decoding = _unions(self._writer, self._first_s, self._last_s)

    def fit_prefill(self) -> _PrefillFit:
        """What the time of a step with one prompt is made of."""
        lone_s = np.array([self._steps.read_s(each.prompt_tokens) for each in self._answers])
        # Whoever waited shares a step with others who did.
        is_alone = self._queued_s < 0.1 * lone_s
        is_alone &= self._prompts <= self._steps.max_step_tokens
        if is_alone.sum() < MIN_FITTED:
            return _PrefillFit()
        start_s, num = self._first_s - self._prefill_s, self._steps.num_decode
        share = _shares(self._decoding, start_s, self._first_s, num)
        spans = np.column_stack([self._first_s, self._last_s])
        answers = _shares([spans], start_s, self._first_s, num)
        terms = np.column_stack([lone_s, lone_s * share, lone_s * np.maximum(answers - share, 0.0)])
        # Longer steps count more, by less than their length: their errors grow with it.
        weight = (1 / np.sqrt(lone_s))[is_alone]
        scale, slowed, per_answer = map(
            float,
            fit_typical(terms[is_alone] * weight[:, None], self._prefill_s[is_alone] * weight),
        )
        if scale <= 0:
            return _PrefillFit()
        return _PrefillFit(scale=scale, beside=1 + slowed / scale, beside_answer=per_answer / scale)

    def fit_handoff(self) -> tuple[float, float]:
        """In TTFT: always, and more while the decode worker computes for others."""
        is_busy = self._is_busy_at_first().astype(float)
        terms = np.column_stack([np.ones(len(is_busy)), is_busy])
        always_s, busy_s = fit_typical(terms, self._handoff_s)
        return float(always_s), float(busy_s)

    def fit_decode(self, busy_handoff_s: float) -> _DecodeFit:
        """What the time between first and last token is made of."""
        num, first_s = self._steps_made, self._first_s
        others, context = self._company()
        steps = self._steps.decode
        base_s = (
            steps.fixed_s
            + steps.decode_token_s * (1 + others)
            + steps.decode_context_token_s * context
        )
        is_busy = self._is_busy_at_first().astype(float)
        span_s = self._last_s - first_s + busy_handoff_s * is_busy
        beside = _shares(self._reading, first_s, self._last_s, self._steps.num_prefill)
        # In units of the answer's own time by the fit: long ones say no more than short ones.
        weight = 1 / (num * base_s)
        terms = weight[:, None] * np.column_stack(
            [
                (num + 0.5 * is_busy) * base_s,
                num * base_s * beside,
                1 - is_busy,
                np.ones(len(num)),
            ]
        )
        came = weight * (self._num_new(self._last_s) + is_busy) / 2
        # An answer that is late for another reason sees more requests come. What it had seen had it
        # lasted as expected stands in for that (two-stage least squares).
        expected_s = num * base_s * float(span_s.sum() / (num * base_s).sum())
        outside = np.column_stack([terms, weight * self._num_new(first_s + expected_s)])
        foreseen = outside @ np.linalg.lstsq(outside, came, rcond=None)[0]
        weights = fit_non_negative(np.column_stack([terms, foreseen]), span_s * weight)
        scale, slowed, wake_s, late_s, stolen_s = map(float, weights)
        explained = np.column_stack([terms, came]) @ weights
        answer_scatter, step_scatter = _scatter(span_s * weight / explained - 1, num)
        return _DecodeFit(
            scale=scale,
            beside=1 + slowed / scale if scale > 0 else 1.0,
            stolen_s=stolen_s,
            wake_s=wake_s,
            late_s=late_s,
            answer_scatter=answer_scatter,
            step_scatter=step_scatter,
        )

    def _num_new(self, until_s: Floats) -> Floats:
        """Requests that come, and that land, at its decode worker from each first token on."""
        is_here = self._writer[None, :] == self._writer[:, None]
        came = _within(self._sent_s, self._first_s, until_s)
        landed = _within(self._first_s, self._first_s, until_s)
        found: Floats = ((came & is_here).sum(axis=1) + (landed & is_here).sum(axis=1)).astype(
            float
        )
        return found

    def _is_busy_at_first(self) -> NDArray[np.bool_]:
        """Whether the decode worker was computing for others when the prompt was read."""
        begun = (self._first_s[None, :] < self._first_s[:, None]) & (
            self._last_s[None, :] > self._first_s[:, None]
        )
        is_here = self._writer[None, :] == self._writer[:, None]
        found: NDArray[np.bool_] = (begun & is_here).any(axis=1)
        return found

    def _company(self) -> tuple[Floats, Floats]:
        """Of each answer's time: mean others beside it, and mean context tokens of all."""
        first, last = self._first_s, self._last_s
        both = np.minimum(last[None, :], last[:, None]) - np.maximum(first[None, :], first[:, None])
        both = np.clip(both, 0.0, None) * (self._writer[None, :] == self._writer[:, None])
        np.fill_diagonal(both, 0.0)
        share = both / (last - first)[:, None]
        tokens = self._prompts + self._steps_made / 2
        return share.sum(axis=1), tokens + share @ tokens


def _scatter(errors: Floats, num_steps: Floats) -> tuple[float, float]:
    """Relative standard deviations of answers and of steps: their variances add over n steps as
    answer**2 + step**2 / n. A few far-off answers count no more than the rest."""
    most = float(np.percentile(np.abs(errors), CLIPPED_PERCENT))
    squares = np.minimum(np.abs(errors), most) ** 2
    terms = np.column_stack([np.ones(len(errors)), 1 / num_steps])
    answer, step = fit_non_negative(terms, squares)
    return math.sqrt(answer), math.sqrt(step)


def _between(rng: Random, least: int, most: int) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def _within(at_s: Floats, first_s: Floats, last_s: Floats) -> NDArray[np.bool_]:
    """[i, j]: whether moment j lies inside of span i."""
    return (at_s[None, :] > first_s[:, None]) & (at_s[None, :] < last_s[:, None])


def _unions(names: NDArray[np.str_], first_s: Floats, last_s: Floats) -> list[Floats]:
    """For each worker the spans in which it was busy, apart from each other: [spans, 2]."""
    found = []
    for name in np.unique(names):
        spans: list[list[float]] = []
        chosen = names == name
        for first, last in sorted(zip(first_s[chosen], last_s[chosen], strict=True)):
            if spans and first <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], last)
            else:
                spans.append([first, last])
        found.append(np.array(spans))
    return found


def _shares(busy: Sequence[Floats], first_s: Floats, last_s: Floats, num_workers: int) -> Floats:
    """Of each span, the mean share of workers that were busy."""
    total = np.zeros(len(first_s))
    for spans in busy:
        overlap = np.minimum(spans[None, :, 1], last_s[:, None]) - np.maximum(
            spans[None, :, 0], first_s[:, None]
        )
        total += np.clip(overlap, 0.0, None).sum(axis=1)
    return total / np.maximum(last_s - first_s, 1e-9) / num_workers
