"""The step time model fitted to measurements, each point beside what the fit says of it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients, StepShape

TERMS = (
    "fixed_s",
    "prefill_token_s",
    "prefill_attention_s",
    "decode_token_s",
    "decode_context_token_s",
)
Phase = Literal["prefill", "decode"]
NUM_REWEIGHTINGS = 30
SMALLEST_ERROR = 0.02
"""Of the mean target: rows nearer than that count alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """A measurement: `num_steps` steps that together compute `shape` took `measured_s`."""

    phase: Phase
    label: str
    shape: StepShape
    num_steps: int = 1
    measured_s: float

    def predicted_s(self, coefficients: StepCoefficients) -> float:
        return coefficients.step_s(self.shape) + (self.num_steps - 1) * coefficients.fixed_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A point beside two predictions: of the fit, and of what the workers measured at start."""

    phase: Phase
    label: str
    measured_s: float
    predicted_s: float
    reported_s: float

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted_s / self.measured_s - 1

    @property
    def reported_error(self) -> float:
        return self.reported_s / self.measured_s - 1


def fit_phase(points: Sequence[StepPoint], phase: Phase) -> StepCoefficients:
    """Least squares over the relative errors of one phase's points, no coefficient below zero.

    `relative_error` is the root mean square of measured / predicted - 1. Raises `LocalFault` where
    there is nothing to fit to.
    """
    chosen = [point for point in points if point.phase == phase]
    if not chosen:
        raise LocalFault(f"no {phase} step could be measured")
    measured_s = np.array([point.measured_s for point in chosen])
    terms = np.array([_terms(point) for point in chosen])
    weights = fit_non_negative(terms / measured_s[:, None])
    ratios = measured_s / (terms @ weights) - 1
    values = dict(zip(TERMS, map(float, weights), strict=True))
    return StepCoefficients(**values, relative_error=float(np.sqrt(np.mean(ratios**2))))


def compare(
    points: Sequence[StepPoint],
    fitted: Mapping[Phase, StepCoefficients],
    reported: Mapping[Phase, StepCoefficients],
) -> tuple[Residual, ...]:
    """Every point beside what the fit and the workers' own coefficients say of it."""
    return tuple(
        Residual(
            phase=point.phase,
            label=point.label,
            measured_s=point.measured_s,
            predicted_s=point.predicted_s(fitted[point.phase]),
            reported_s=point.predicted_s(reported[point.phase]),
        )
        for point in points
    )


def error_summary(errors: Sequence[float]) -> tuple[float, float]:
    """Median and 90th percentile of the absolute errors."""
    absolute = np.abs(np.array(errors, float))
    return float(np.median(absolute)), float(np.percentile(absolute, 90))


def fit_link(
    gaps: Sequence[tuple[int, float]], handoff_s: float, step_s: float
) -> tuple[float, float]:
    """Latency and seconds per token of the KV link from (tokens, gap to the second token).

    The simulator counts a first token from its arrival at the client and the KV from the end of
    the prompt's last step, so that the gap is latency + tokens + step - handoff.
    """
    tokens = np.array([float(count) for count, _ in gaps])
    rest_s = np.array([gap_s for _, gap_s in gaps]) - step_s + handoff_s
    slope = 0.0
    if np.ptp(tokens) > 0:
        # The median of the slopes between all pairs (Theil and Sen): one late answer moves nothing.
        slopes = [
            (rest_s[i] - rest_s[j]) / (tokens[i] - tokens[j])
            for i in range(len(tokens))
            for j in range(i)
            if tokens[i] != tokens[j]
        ]
        slope = max(0.0, statistics.median(slopes))
    return max(0.0, float(np.median(rest_s - slope * tokens))), slope


def fit_non_negative(terms: Any, target: Any = None) -> Any:
    """Weights, none below zero, that bring `terms @ weights` closest to `target`, or to 1.

    A term that would turn negative is left out. terms: [rows, terms]; target: [rows].
    """
    if target is None:
        target = np.ones(len(terms))
    scale = np.abs(terms).max(axis=0)
    kept = [column for column in range(terms.shape[1]) if scale[column] > 0]
    weights = np.zeros(terms.shape[1])
    while kept:
        rows = terms[:, kept] / scale[kept]
        solution = np.linalg.lstsq(rows, target, rcond=None)[0]
        if (solution >= 0).all():
            weights[kept] = solution / scale[kept]
            break
        kept.pop(int(np.argmin(solution)))
    return weights


def fit_typical(terms: Any, target: Any) -> Any:
    """The same by least absolute errors: a few far-off rows, which a pause of the machine makes,
    move nothing. Iteratively reweighted least squares."""
    weights = fit_non_negative(terms, target)
    for _ in range(NUM_REWEIGHTINGS):
        errors = np.abs(target - terms @ weights)
        least = max(SMALLEST_ERROR * float(np.abs(target).mean()), 1e-12)
        row_weights = 1 / np.sqrt(np.maximum(errors, least))
        weights = fit_non_negative(terms * row_weights[:, None], target * row_weights)
    return weights


def _terms(point: StepPoint) -> tuple[float, ...]:
    shape = point.shape
    return (
        point.num_steps,
        shape.num_prefill_tokens,
        shape.num_prefill_pairs,
        shape.num_decodes,
        shape.num_decode_context_tokens,
    )
