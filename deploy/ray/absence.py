"""Whether a worker or the router is lost, from what the router says: a decision without I/O."""

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.config.timers import Timers
from pdserve.domain.messages import ClusterState

JOIN_S = 10.0
"""A worker that serves has this long to register, with a new router too."""
REJOIN_S = 1.0
"""A worker whose stream broke registers again within this time, unless it is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Who must be replaced, and why; and who should be asked whether it lives."""

    lost: Mapping[str, str]
    doubtful: tuple[str, ...] = ()


class AbsenceJudge:
    """Remembers when the router had whom."""

    def __init__(self, timers: Timers, now_s: float) -> None:
        self._timers = timers
        self._heard_s = now_s
        self._seen: dict[str, tuple[float, str]] = {}  # when, with what health

    def judge(
        self, now_s: float, state: ClusterState | None, serving: Mapping[str, float]
    ) -> Verdict:
        """`state`: the router's answer, if any; `serving`: since when each worker says it serves.

        A worker is lost once the router has had it and lost it, unless it may still come back by
        itself; the router is lost after `dead_s` without an answer.
        """
        self._seen = {name: seen for name, seen in self._seen.items() if name in serving}
        if state is None:
            silence_s = now_s - self._heard_s
            if silence_s <= self._timers.dead_s:
                return Verdict(lost={})
            self._heard_s = now_s
            return Verdict(lost={"router": f"did not answer for {silence_s:.1f} s"})
        self._heard_s = now_s
        health = {str(each.hello.worker_id): each.health for each in state.workers}
        for name in serving:
            if name in health:
                self._seen[name] = (now_s, health[name])
        absent = [name for name in serving if name not in health]
        reasons = {
            name: self._why(name, now_s, serving[name], now_s - state.uptime_s) for name in absent
        }
        return Verdict(
            lost={name: why for name, why in reasons.items() if why},
            doubtful=tuple(name for name in serving if health.get(name) == "suspect"),
        )

    def _why(self, name: str, now_s: float, serving_since_s: float, router_since_s: float) -> str:
        """Empty: it may still come."""
        seen = self._seen.get(name)
        if seen is None or seen[0] < router_since_s:
            waited_s = now_s - max(serving_since_s, router_since_s)
            return f"has not registered for {waited_s:.1f} s" if waited_s > JOIN_S else ""
        seen_s, health = seen
        if health == "suspect":
            return f"was silent for {self._timers.dead_s:g} s"
        gone_s = now_s - seen_s
        return f"has been gone for {gone_s:.1f} s" if gone_s > REJOIN_S else ""
