"""The step time model fitted to measurements, and the `profile.json` that keeps it.

The file has DistServe's form (coefficients in ms by model and tensor parallelism), so that whatever
reads that form reads this one, and under `pdserve` in each entry what that form has no place for.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients, StepShape
from placement.simulation.timing import StepTiming
from placement.simulation.values import Link, PdserveOptions, Pool, PoolRole

SECTION = "pdserve"
FORM = 1
NO_THRESHOLD = 1 << 30  # DistServe's second decode line starts beyond any batch
TERMS = (
    "fixed_s",
    "prefill_token_s",
    "prefill_attention_s",
    "decode_token_s",
    "decode_context_token_s",
)
MIN_DECODE_SHARE = 0.2
Phase = Literal["prefill", "decode"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """What passing a request on adds. `handoff_s` is in TTFT, the link's part in the second token's
    gap."""

    handoff_s: float
    link_latency_s: float
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """What prompts and a decoding worker cost each other beside the steps that they take.

    The decode worker owns a request: it forwards the prompt, lands and checks its KV and sends its
    first token between its own steps, on the same cores.
    """

    busy_handoff_s: float = 0.0  # added to TTFT where the decode worker is in a step
    stolen_s: float = 0.0  # decode time that one request takes from those under way
    busy_prefill: float = 1.0  # time of a prefill step while others decode / alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the workers are bound by, as they report it; KV in tokens of one worker."""

    prefill_kv_tokens: int
    decode_kv_tokens: int
    kv_bytes_per_token: float
    block_size: int
    max_step_tokens: int
    max_num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedProfile:
    """What `pdserve profile` found out about one model on one kind of worker."""

    model: str
    prefill: StepCoefficients
    decode: StepCoefficients
    handoff: Handoff
    limits: Limits
    interference: Interference = Interference()
    residuals: tuple[Residual, ...] = ()
    foreign_cores: float | None = None  # busy with other programs while measuring; None: not known

    def coefficients(self, phase: Phase) -> StepCoefficients:
        return self.prefill if phase == "prefill" else self.decode

    def under_load(self, rate: float, decode_busy: float) -> "FittedProfile":
        """The profile with the mean interference at so many requests/s for each decode worker.

        `decode_busy`: share of time in which it decodes. Poisson arrivals meet it busy as often.
        """
        found = self.interference
        stretch = 1 / max(1 - rate * found.stolen_s, MIN_DECODE_SHARE)
        slowed = 1 + decode_busy * (found.busy_prefill - 1)
        handoff_s = self.handoff.handoff_s + decode_busy * found.busy_handoff_s
        return replace(
            self,
            prefill=_stretched(self.prefill, slowed),
            decode=_stretched(self.decode, stretch),
            handoff=replace(self.handoff, handoff_s=handoff_s),
        )

    def pools(self, *, num_prefill: int, num_decode: int) -> tuple[Pool, ...]:
        """The profiled cluster, with any number of workers, for the simulator."""
        handoff, limits = self.handoff, self.limits
        link = Link(bytes_per_s=handoff.link_bytes_per_s, latency_s=handoff.link_latency_s)
        return tuple(
            Pool(
                role=role,
                replicas=replicas,
                timing=StepTiming.of_coefficients(coefficients, source="fitted on the engine"),
                gpu="profiled",
                kv_tokens=kv_tokens,
                kv_bytes_per_token=limits.kv_bytes_per_token,
                link=link,
            )
            for role, replicas, coefficients, kv_tokens in (
                (PoolRole.PREFILL, num_prefill, self.prefill, limits.prefill_kv_tokens),
                (PoolRole.DECODE, num_decode, self.decode, limits.decode_kv_tokens),
            )
        )

    def options(self) -> PdserveOptions:
        """The workers' limits and the handoff, for the simulator under rules pdserve."""
        return PdserveOptions(
            max_step_tokens=self.limits.max_step_tokens,
            max_num_requests=self.limits.max_num_requests,
            block_size=self.limits.block_size,
            handoff_s=self.handoff.handoff_s,
        )


def _stretched(coefficients: StepCoefficients, factor: float) -> StepCoefficients:
    return replace(coefficients, **{name: factor * getattr(coefficients, name) for name in TERMS})


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
    weights = _non_negative_fit(terms / measured_s[:, None])
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


def to_json(profile: FittedProfile) -> dict[str, Any]:
    """The content of `profile.json`."""
    prefill, decode = profile.prefill, profile.decode
    ms = 1e3
    pair = prefill.prefill_attention_s / 2  # L**2 = 2 * pairs - L
    decode_line = [
        decode.fixed_s * ms,
        decode.decode_context_token_s * ms,
        (decode.decode_token_s - decode.decode_context_token_s) * ms,
    ]
    plain = asdict(profile)
    entry = {
        "prefill": [prefill.fixed_s * ms, (prefill.prefill_token_s + pair) * ms, pair * ms],
        "decoding_smallbs": decode_line,
        "decoding_largebs": decode_line,
        "decoding_large_small_bs_threshold": NO_THRESHOLD,
        "max_num_tokens": profile.limits.decode_kv_tokens,
        SECTION: {
            "form": FORM,
            **{name: value for name, value in plain.items() if name != "model"},
        },
    }
    return {profile.model: {"1": entry}}


def write_profile(profile: FittedProfile, path: Path) -> None:
    """Raises `LocalFault` where that cannot be."""
    try:
        path.write_text(json.dumps(to_json(profile), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise LocalFault(f"{path}: {error.strerror}") from None


def read_profile(path: Path) -> FittedProfile:
    """The only profile in a file that `write_profile` wrote; raises `LocalFault`."""
    try:
        by_model = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LocalFault(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise LocalFault(f"{path}: not JSON: {error}") from None
    try:
        [(model, by_tp)] = by_model.items()
        section = by_tp["1"][SECTION]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise LocalFault(f"{path}: not a profile that `pdserve profile` wrote") from None
    if section.get("form") != FORM:
        raise LocalFault(f"{path}: form {section.get('form')!r}; this pdserve reads form {FORM}")
    try:
        return FittedProfile(
            model=model,
            prefill=StepCoefficients(**section["prefill"]),
            decode=StepCoefficients(**section["decode"]),
            handoff=Handoff(**section["handoff"]),
            limits=Limits(**section["limits"]),
            interference=Interference(**section["interference"]),
            residuals=tuple(Residual(**each) for each in section["residuals"]),
            foreign_cores=section["foreign_cores"],
        )
    except (KeyError, TypeError) as error:
        raise LocalFault(f"{path}: damaged: {error}") from None


def simulation_yaml(profile: FittedProfile, profile_file: str) -> str:
    """A `sim.yaml` of one prefill and one decode worker as profiled."""
    handoff, limits = profile.handoff, profile.limits
    return f"""\
rules: pdserve
latency: {{profile: {profile_file}, model: {profile.model}}}
pools:
  - {{role: prefill, replicas: 1, gpu: profiled, max_num_tokens: {limits.prefill_kv_tokens}}}
  - {{role: decode, replicas: 1, gpu: profiled, max_num_tokens: {limits.decode_kv_tokens}}}
slo: {{ttft_s: 1.0, tpot_s: 0.1, attainment: 0.9}}
pdserve:
  max_step_tokens: {limits.max_step_tokens}
  max_num_requests: {limits.max_num_requests}
  block_size: {limits.block_size}
  handoff_s: {handoff.handoff_s:.6f}
"""


def _terms(point: StepPoint) -> tuple[float, ...]:
    shape = point.shape
    return (
        point.num_steps,
        shape.num_prefill_tokens,
        shape.num_prefill_pairs,
        shape.num_decodes,
        shape.num_decode_context_tokens,
    )


def _non_negative_fit(terms: Any) -> Any:
    """Weights that bring every row closest to 1; a term that would turn negative is left out."""
    scale = np.abs(terms).max(axis=0)
    kept = [column for column in range(terms.shape[1]) if scale[column] > 0]
    weights = np.zeros(terms.shape[1])
    while kept:
        rows = terms[:, kept] / scale[kept]
        solution = np.linalg.lstsq(rows, np.ones(len(terms)), rcond=None)[0]
        if (solution >= 0).all():
            weights[kept] = solution / scale[kept]
            break
        kept.pop(int(np.argmin(solution)))
    return weights
