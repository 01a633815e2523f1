"""SLO classes: what each request was promised, whether it got it, and the count of both.

A request is judged by the router's clock: TTFT from its receipt to its first token sent, TPOT the
mean gap between its tokens after the first. Failed and refused requests got neither. A request
that its client gave up counts only if its first token was late by then; one that was wrong from the
start (`BadRequest`) does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pdserve.config.processes import SloClass
from pdserve.domain.errors import BadRequest, FieldViolation
from pdserve.domain.messages import SloState
from router.in_flight import Outcome


class SloResult(StrEnum):
    MET = "met"
    MISSED_TTFT = "missed_ttft"
    MISSED_TPOT = "missed_tpot"
    MISSED_BOTH = "missed_both"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the client of a request got; None: no first token, no second one."""

    total_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None


def judge(promise: SloClass, outcome: Outcome, seen: Seen) -> SloResult | None:
    """The result of a request that ended; None where it tells nothing of the service."""
    waited_s = seen.total_s if seen.ttft_s is None else seen.ttft_s
    is_late = waited_s > promise.ttft_s
    is_slow = seen.tpot_s is not None and seen.tpot_s > promise.tpot_s
    match outcome:
        case Outcome.FAILED:
            return SloResult.FAILED
        case Outcome.REFUSED:
            return SloResult.REFUSED
        case Outcome.CANCELLED:
            return SloResult.MISSED_TTFT if is_late else None
    if is_late:
        return SloResult.MISSED_BOTH if is_slow else SloResult.MISSED_TTFT
    return SloResult.MISSED_TPOT if is_slow else SloResult.MET


class SloBook:
    """The classes of one router and their counts."""

    def __init__(self, classes: Sequence[SloClass] = ()) -> None:
        self.classes = tuple(classes)
        self._counts = {each.name: dict.fromkeys(SloResult, 0) for each in self.classes}

    def find(self, name: str) -> SloClass | None:
        """The class of that name, the first one for "", None where there are no classes.

        Raises `BadRequest` for a name that is not known.
        """
        if not name:
            return self.classes[0] if self.classes else None
        for each in self.classes:
            if each.name == name:
                return each
        # The name asked for is the client's text: it is not repeated.
        known = ", ".join(each.name for each in self.classes)
        rule = (
            f"is not known; known: {known}" if known else "must be empty: no classes are set here"
        )
        raise BadRequest.of([FieldViolation("slo_class", rule)])

    def count(self, promise: SloClass, outcome: Outcome, seen: Seen) -> SloResult | None:
        """Judge a request that ended, and add it to its class."""
        result = judge(promise, outcome, seen)
        if result is not None:
            self._counts[promise.name][result] += 1
        return result

    def states(self) -> tuple[SloState, ...]:
        """For operators."""
        return tuple(
            SloState(
                name=each.name,
                ttft_s=each.ttft_s,
                tpot_s=each.tpot_s,
                target=each.attainment,
                **{f"num_{result}": count for result, count in self._counts[each.name].items()},
            )
            for each in self.classes
        )
