"""`plan.yaml`: what to run, the limits that protect its prediction, and that prediction."""

import math
from dataclasses import asdict, replace
from typing import Literal

import yaml
from pydantic import Field, model_validator

from pdserve.config.base import Settings, parse_settings
from pdserve.config.override import OverrideConfig
from pdserve.config.processes import DEFAULT_BLOCK_SIZE, POLICY, BlockSize, CoefficientSettings
from pdserve.domain.errors import LocalFault
from pdserve.domain.pair_cost import PolicyName
from pdserve.domain.waiting import QueueOrder
from placement.linear_steps import linear_steps
from placement.search.designs import Design, Worker
from placement.search.results import PlanResult, Prediction
from placement.simulation.values import PdserveOptions, PoolRole, TrafficClass, can_serve

PLAN_VERSION = 1
WAITING_SIGMAS, MIN_WAITING = 6.0, 4


class PlanPool(Settings):
    """Workers that are alike, and where they run."""

    role: PoolRole
    gpu: str
    tp: int = Field(ge=1)
    pp: int = Field(1, ge=1)
    ep: int = Field(1, ge=1)
    replicas: int = Field(ge=1)
    kv_tokens: int = Field(0, ge=0, description="KV memory of one worker; 0: not known")
    block_size: BlockSize | None = Field(
        None, description="tokens in its KV blocks; left out: the plan's"
    )
    step_times: CoefficientSettings | None = Field(
        None, description="of one worker, seconds; what `up --engine timed` runs on"
    )
    queue_order: QueueOrder | None = Field(
        None, description="who waits at a worker is next by this; left out: its role's own"
    )
    nodes: tuple[str, ...] = Field((), description="gpu:node of the first cell, one a worker")


class PlanLimits(Settings):
    """What workers and router enforce; beyond them the prediction does not hold."""

    max_step_tokens: int = Field(ge=1, description="prompt tokens in one engine step")
    max_num_requests: int = Field(ge=1, description="decoded at once by one worker")
    max_num_waiting: int = Field(ge=0, description="requests without a first token, in the cluster")
    max_wait_s: float = Field(ge=0, description="predicted wait at which a request is refused")
    max_rate: float = Field(ge=0, description="requests/s that the plan is good for; 0: no limit")
    max_burst: int | None = Field(
        None, ge=1, description="requests that max_rate lets in at once; left out: those of 10 s"
    )


class PlanPrediction(Settings):
    """What to expect at `rate`; the interval is of 95 % over seeds."""

    rate: float
    goodput: float
    goodput_per_gpu: float
    attainment: float
    attainment_interval: tuple[float, float]
    ttft_s: dict[str, float] = Field(default_factory=dict, description="p50, p90, p99")
    tpot_s: dict[str, float] = Field(default_factory=dict, description="p50, p90, p99")
    usd_per_hour: float
    usd_per_million_tokens: float
    watts: float
    horizon_s: float
    num_seeds: int
    step_time_error: float = Field(description="of the step times, as their source states")


class Plan(Settings):
    """The plan file."""

    version: Literal[1] = 1
    model: str
    rules: str
    policy: PolicyName = Field("least_total_time", description=POLICY)
    block_size: BlockSize = DEFAULT_BLOCK_SIZE
    cells: int = Field(1, ge=1, description="copies of the pools below, each with its share")
    pools: tuple[PlanPool, ...] = Field(min_length=1)
    slo: tuple[TrafficClass, ...] = ()
    override_config: OverrideConfig = None
    limits: PlanLimits
    prediction: PlanPrediction
    sources: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _can_serve(self) -> "Plan":
        if not can_serve({pool.role for pool in self.pools}):
            raise ValueError("pools: needs prefill and decode, or colocated alone")
        return self

    @property
    def num_gpus(self) -> int:
        return self.cells * sum(pool.tp * pool.pp * pool.replicas for pool in self.pools)


def plan_of(result: PlanResult) -> Plan:
    """The plan file of an answer."""
    prediction, design = result.prediction, result.design
    simulated = PdserveOptions.model_validate(result.inputs.get("pdserve") or {})
    percentiles = prediction.percentiles or {}
    slo = tuple(
        TrafficClass(
            name=item.name,
            ttft_s=item.ttft_s,
            tpot_s=item.tpot_s,
            attainment=item.target,
            share=_share(result, item.name),
        )
        for item in prediction.classes
    )
    loosest = max((item.ttft_s for item in slo), default=0.0)
    return Plan(
        model=str(result.inputs.get("model", "")),
        override_config=result.inputs.get("override_config"),
        rules=str(result.inputs.get("rules", "pdserve")),
        policy=simulated.policy,
        block_size=simulated.block_size,
        cells=result.num_cells,
        pools=tuple(
            PlanPool(
                role=worker.role,
                gpu=worker.gpu,
                tp=worker.tp,
                pp=worker.pp,
                ep=worker.ep,
                replicas=count,
                kv_tokens=worker.pool.kv_tokens,
                step_times=_step_times(worker, design),
                nodes=_nodes_of(result, worker.label),
            )
            for worker, count in design.counts
        ),
        slo=slo,
        limits=PlanLimits(
            max_step_tokens=design.max_step_tokens,
            max_num_requests=design.max_num_requests,
            max_num_waiting=_max_num_waiting(prediction, result.num_cells, loosest),
            max_wait_s=max(loosest, prediction.longest_wait_s),
            max_rate=_rounded(result.max_rate),
            max_burst=result.max_burst,
        ),
        prediction=PlanPrediction(
            rate=_rounded(prediction.rate * result.num_cells),
            goodput=_rounded(prediction.goodput * result.num_cells),
            goodput_per_gpu=_rounded(result.economy.goodput_per_gpu),
            attainment=_rounded(prediction.attainment),
            attainment_interval=(
                _rounded(prediction.interval[0]),
                _rounded(prediction.interval[1]),
            ),
            ttft_s={k: _rounded(v) for k, v in percentiles.get("ttft_s", {}).items()},
            tpot_s={k: _rounded(v) for k, v in percentiles.get("tpot_s", {}).items()},
            usd_per_hour=_rounded(result.economy.usd_per_hour * result.num_cells),
            usd_per_million_tokens=_rounded(result.economy.usd_per_million_tokens),
            watts=_rounded(result.economy.watts * result.num_cells),
            horizon_s=prediction.horizon_s,
            num_seeds=prediction.num_seeds,
            step_time_error=_rounded(result.relative_error),
        ),
        sources=result.sources,
    )


def _step_times(worker: Worker, design: Design) -> CoefficientSettings:
    found = linear_steps(
        replace(worker.pool, role=worker.role),
        max_step_tokens=design.max_step_tokens,
        max_num_requests=design.max_num_requests,
    )
    return CoefficientSettings(**{name: _rounded(value) for name, value in asdict(found).items()})


def _max_num_waiting(prediction: Prediction, num_cells: int, loosest_s: float) -> int:
    """Waiting requests beyond which a promise is lost anyway, and which the prediction never had.

    Those who wait longer than their TTFT are lost, so that at most the arrivals of one TTFT are
    worth keeping. They vary with a standard deviation of cv * sqrt(mean): six of them above the
    mean, plus a few, leave other draws of the same traffic untouched. What waited at once in the
    prediction's own runs is let in whatever this says: their bursts need not follow any cv.
    """
    mean = prediction.rate * num_cells * loosest_s
    spread = max(prediction.gap_cv, 1.0) * math.sqrt(mean)
    usual = math.ceil(mean + WAITING_SIGMAS * spread) + MIN_WAITING
    return max(usual, prediction.most_waiting * num_cells)


def _share(result: PlanResult, name: str) -> float:
    slo = result.inputs.get("slo")
    for item in slo if isinstance(slo, list | tuple) else [slo]:
        if isinstance(item, dict) and item.get("name", "all") == name:
            return float(item.get("share", 1.0))
    return 1.0


def _nodes_of(result: PlanResult, label: str) -> tuple[str, ...]:
    names = []
    for node in result.nodes:
        for worker, count in node["workers"].items():
            if worker == label or worker.startswith(f"{label} stage "):
                names += [f"{node['gpu']}:{node['node']}"] * count
    return tuple(names)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def format_plan(plan: Plan) -> str:
    """The YAML text; `parse_plan` of it gives an equal plan."""
    head = "# A plan of pdserve: `pdserve up plan.yaml` starts it. `limits` protect `prediction`.\n"
    data = plan.model_dump(mode="json")
    return head + yaml.safe_dump(data, sort_keys=False, width=100, default_flow_style=None)


def parse_plan(data: object, *, source: str) -> Plan:
    """Check a plan's settings; another version is refused by its number."""
    version = data.get("version") if isinstance(data, dict) else None
    if version is not None and version != PLAN_VERSION:
        raise LocalFault(
            f"{source}: version {version!r} is not known here; this pdserve reads {PLAN_VERSION}"
        )
    return parse_settings(Plan, data, source=source)
