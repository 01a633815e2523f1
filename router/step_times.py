"""What a worker's steps are taken to cost: measured once at its start, corrected while it serves.

Workers that should be equally fast (same role, model, engine and hardware) are taken to be so until
their steps say otherwise, because what two equal workers measure at their start lies up to three
times apart on a busy machine:

    shape     of their start measurements, each coefficient's median
    common    how much slower live steps are than that shape: the median, the surest count most
    own       how far one of them lies from `common`, as far as that cannot be chance:
              nothing within two standard errors, nearly all of it far beyond them

A worker's error grows while it takes no steps: one that was slow is tried again some time.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

from pdserve.domain.ids import WorkerId
from pdserve.domain.latency import LiveSteps, StepCoefficients
from pdserve.domain.messages import WorkerHello, WorkerLoad

NUM_ERRORS = 2.0
DRIFT_PER_S = 0.3**2 / 60
"""Variance that a speed gains while nobody measures it: 30 % in a minute."""
MIN_ERROR, MAX_ERROR = 0.01, 1000.0
MAX_SLOWNESS = 1000.0
NUM_DIGITS = 6
"""Rounded to this many decimals, so that workers as fast as they were said to be are exactly so."""

Report = tuple[WorkerHello, WorkerLoad]
StepsOf = Callable[[WorkerLoad], LiveSteps | None]


def step_times(reports: Iterable[Report]) -> dict[WorkerId, StepCoefficients]:
    """What each worker's steps are taken to cost. Pure; finite and not negative like its input."""
    groups: dict[Hashable, list[Report]] = defaultdict(list)
    for report in reports:
        groups[_likeness(report[0])].append(report)
    times: dict[WorkerId, StepCoefficients] = {}
    for group in groups.values():
        times |= _group_times(group)
    return times


def _likeness(hello: WorkerHello) -> Hashable:
    """Equal for workers that should be equally fast; times that were given are never doubted."""
    if not hello.hardware:
        return hello.worker_id
    given = None if hello.is_measured else hello.coefficients
    model = (hello.model_hash, hello.layout)
    return (hello.role, hello.engine, model, hello.hardware, given)


def _group_times(group: Sequence[Report]) -> dict[WorkerId, StepCoefficients]:
    shape = _median([hello.coefficients for hello, _ in group])
    prefill = _slownesses(group, shape, lambda load: load.prefill_steps)
    decode = _slownesses(group, shape, lambda load: load.decode_steps)
    return {
        hello.worker_id: _corrected(
            shape,
            prefill_slowness=prefill.get(hello.worker_id),
            decode_slowness=decode.get(hello.worker_id),
        )
        for hello, _ in group
    }


def _median(measured: Sequence[StepCoefficients]) -> StepCoefficients:
    names = [entry.name for entry in fields(StepCoefficients)]
    return StepCoefficients(
        **{name: median(getattr(each, name) for each in measured) for name in names}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evidence:
    slowness: float  # log of measured over predicted
    error: float

    @property
    def weight(self) -> float:
        return 1 / self.error**2


def _slownesses(
    group: Sequence[Report], shape: StepCoefficients, steps_of: StepsOf
) -> Mapping[WorkerId, float]:
    """By worker, how many times longer its steps of one kind take than `shape` says.

    Empty while nobody has taken such steps; who has not is as slow as the others.
    """
    found = {
        hello.worker_id: evidence
        for hello, load in group
        if (evidence := _evidence(steps_of(load), shape)) is not None
    }
    if not found:
        return {}
    common = _common(list(found.values()))
    own = {worker_id: _own(each, common) for worker_id, each in found.items()}
    return {
        hello.worker_id: round(math.exp(common + own.get(hello.worker_id, 0.0)), NUM_DIGITS)
        for hello, _ in group
    }


def _evidence(steps: LiveSteps | None, shape: StepCoefficients) -> _Evidence | None:
    slowness = steps.slowness(shape) if steps is not None else None
    if steps is None or slowness is None:
        return None
    slowness = min(max(slowness, 1 / MAX_SLOWNESS), MAX_SLOWNESS)
    drift = math.sqrt(DRIFT_PER_S * steps.age_s)
    error = min(max(math.hypot(steps.relative_error, drift), MIN_ERROR), MAX_ERROR)
    return _Evidence(slowness=math.log(slowness), error=error)


def _common(found: Sequence[_Evidence]) -> float:
    """The median, each weighing by how sure it is, interpolated: of two, their weighted mean."""
    ranked = sorted(found, key=lambda each: (each.slowness, each.error))
    half = math.fsum(each.weight for each in ranked) / 2
    below = ranked[0].weight / 2  # the weight up to the middle of `low`
    for low, high in itertools.pairwise(ranked):
        between = (low.weight + high.weight) / 2
        if below + between >= half:
            share = max(0.0, (half - below) / between)
            return low.slowness + share * (high.slowness - low.slowness)
        below += between
    return ranked[-1].slowness


def _own(evidence: _Evidence, common: float) -> float:
    """The part of a difference that is not chance (positive-part James-Stein shrinkage)."""
    difference = evidence.slowness - common
    chance = NUM_ERRORS * evidence.error
    if abs(difference) <= chance:
        return 0.0
    return difference * (1 - (chance / difference) ** 2)


def _corrected(
    shape: StepCoefficients, *, prefill_slowness: float | None, decode_slowness: float | None
) -> StepCoefficients:
    """Each term by the slowness of the steps that it matters in; of unknown ones, the other's."""
    if decode_slowness is None:
        decode_slowness = 1.0 if prefill_slowness is None else prefill_slowness
    if prefill_slowness is None:
        prefill_slowness = decode_slowness
    return replace(
        shape,
        fixed_s=decode_slowness * shape.fixed_s,
        prefill_token_s=prefill_slowness * shape.prefill_token_s,
        prefill_attention_s=prefill_slowness * shape.prefill_attention_s,
        decode_token_s=decode_slowness * shape.decode_token_s,
        decode_context_token_s=decode_slowness * shape.decode_context_token_s,
    )
