"""What the solver answers: all that a table, a plan file and a report need, as plain values."""

import math
from dataclasses import dataclass, field
from typing import Any

from placement.search.bursts import allowed_burst
from placement.search.designs import Design
from placement.search.judging import Slowdown
from placement.simulation.summary import clean


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPrediction:
    """One SLO class; shares of its requests, the interval of 95 % over seeds."""

    name: str
    ttft_s: float
    tpot_s: float
    target: float
    attainment: float
    interval: tuple[float, float]
    attainment_ttft: float
    attainment_tpot: float
    percentiles: dict[str, dict[str, float]] | None = None  # of its requests, as in Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A design at one rate, over all seeds. Percentiles are None in an overloaded design, since
    they then only tell how long the run was."""

    rate: float
    goodput: float  # requests/s that meet their class's promises
    attainment: float
    interval: tuple[float, float]
    classes: tuple[ClassPrediction, ...]
    percentiles: dict[str, dict[str, float]] | None  # ttft_s, tpot_s, e2e_s: p50, p90, p99
    utilisation: dict[str, float]  # by pool
    verdict: str
    is_kept: bool
    margin: float  # least over classes of attainment less target, mean over seeds
    bottleneck: str
    binds: str  # which promise gives way first
    horizon_s: float
    num_seeds: int
    num_requests: int
    slowdowns: tuple[Slowdown, ...] = ()  # of the first seed, under Splitwise's promises
    most_waiting: int = 0  # requests without a first token at once, in any seed
    longest_wait_s: float = 0.0  # for the prompts ahead, as the router predicts it, in any seed
    gap_cv: float = 1.0  # of the arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Economy:
    """What a design costs for what it gives."""

    num_gpus: int
    usd_per_hour: float
    watts: float
    goodput_per_gpu: float
    usd_per_million_tokens: float  # prompt and answer together, at the predicted rate
    joules_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another design beside the plan, and why it was not chosen."""

    design: Design
    what: str
    goodput: float
    goodput_per_gpu: float
    usd_per_hour: float
    why_not: str
    is_better: bool = False
    interval: tuple[float, float] = (0.0, math.inf)


def rival_of(
    design: Design,
    what: str,
    goodput: float,
    why_not: str,
    *,
    is_better: bool = False,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Rival:
    """A rival with what follows from its design and goodput."""
    return Rival(
        design=design,
        what=what,
        goodput=goodput,
        goodput_per_gpu=goodput / design.num_gpus,
        usd_per_hour=design.usd_per_hour,
        why_not=why_not,
        is_better=is_better,
        interval=interval,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The plan under one changed circumstance."""

    name: str
    rate: float
    attainment: float
    interval: tuple[float, float]
    is_kept: bool
    verdict: str
    ttft_p90_s: float | None
    tpot_p90_s: float | None
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points for a chart."""

    name: str
    x: str
    y: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStats:
    listed: int
    pruned_by_bound: int
    pruned_by_estimate: int
    pruned_by_failed_pool: int
    simulated: int
    num_runs: int
    num_requests: int
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlan:
    """Nothing keeps the promises; the nearest things that would."""

    reason: str
    nearest: tuple[str, ...]
    best: Design | None = None
    best_rate: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": None,
            "reason": self.reason,
            "nearest": list(self.nearest),
            "best_design": None if self.best is None else design_json(self.best),
            "best_rate": self.best_rate,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """The chosen design of one cell, of which there are `num_cells`, and everything about it.

    `prediction` is of one cell at its share of the rate; `total_*` are of the cluster.
    """

    design: Design
    num_cells: int
    prediction: Prediction
    goodput: float  # of a cell: the highest rate that keeps the promises
    goodput_interval: tuple[float, float]
    economy: Economy
    nodes: tuple[dict[str, Any], ...]  # per node: its workers
    affinity: str
    cross_node_bytes_per_s: float
    disaggregation: str = ""  # whether it pays, in a sentence
    notes: tuple[str, ...]
    neighbours: tuple[Rival, ...] = ()
    runner_ups: tuple[Rival, ...] = ()
    one_gpu_more: str = ""
    what_ifs: tuple[WhatIf, ...] = ()
    sensitivity: tuple[WhatIf, ...] = ()
    spare: Rival | None = None  # the cheapest that survives the loss of a worker
    judged: "PlanResult | None" = None  # the design that was asked about
    corrected: Rival | None = None  # Splitwise's question with decode times as measured
    curves: tuple[Curve, ...] = ()
    stats: SearchStats
    inputs: dict[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    relative_error: float = 0.0
    burst: int = 0  # of a cell: arrivals of its traces that ran ahead of its highest rate
    gap_cv: float = 1.0  # of the arrivals

    @property
    def max_rate(self) -> float:
        """Requests/s that the cluster is good for."""
        return max(self.goodput, self.prediction.rate) * self.num_cells

    @property
    def max_burst(self) -> int:
        """Requests that may come at once beyond `max_rate`."""
        simulated = self.burst * self.num_cells
        return allowed_burst(simulated, rate=self.max_rate, gap_cv=self.gap_cv)

    @property
    def total_goodput(self) -> float:
        return self.goodput * self.num_cells

    @property
    def total_rate(self) -> float:
        return self.prediction.rate * self.num_cells

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file; infinite and undefined numbers become None.

        `totals` are of all cells together, everything else is of one.
        """
        plain = clean(_plain(self))
        assert isinstance(plain, dict)
        plain["totals"] = {
            "goodput": self.total_goodput,
            "rate": self.total_rate,
            "num_gpus": self.economy.num_gpus * self.num_cells,
            "usd_per_hour": self.economy.usd_per_hour * self.num_cells,
            "watts": self.economy.watts * self.num_cells,
        }
        return plain


def design_json(design: Design) -> dict[str, Any]:
    """Pools and limits of a design."""
    return {
        "label": design.label,
        "kind": design.kind,
        "num_gpus": design.num_gpus,
        "pools": [
            {
                "role": str(worker.role),
                "gpu": worker.gpu,
                "tp": worker.tp,
                "pp": worker.pp,
                "ep": worker.ep,
                "replicas": count,
            }
            for worker, count in design.counts
        ],
        "max_step_tokens": design.max_step_tokens,
        "max_num_requests": design.max_num_requests,
    }


def _plain(value: object) -> Any:
    if isinstance(value, Design):
        return design_json(value)
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy number
        return value.item()
    return value
