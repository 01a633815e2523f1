"""The one YAML that a plan is made from; `pdserve plan --example` prints it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pdserve.config.base import Settings, parse_settings, read_yaml
from pdserve.config.override import OverrideConfig
from pdserve.domain.errors import LocalFault
from placement.demand import Lengths, SharedPrefix
from placement.simulation.settings import LatencySettings, check_parts
from placement.simulation.values import (
    PdserveOptions,
    PoolRole,
    Rules,
    SplitwiseOptions,
    TrafficClass,
)

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]

EXAMPLE = """\
# What pdserve plan is asked: pdserve plan inputs.yaml --output plan.yaml
model: meta-llama/Llama-3.1-70B   # a config.json, its folder, or a name of the catalogue
# override_config: {max_context_tokens: 8192}   # or rope scaling; see docs/models.md
weights: null          # bf16, fp8, int8, int4, mxfp4, nvfp4; left out: as the config says
kv: null               # bf16 or fp8; left out: as the config says
rules: pdserve         # whose queues are simulated: pdserve; distserve, splitwise: published ones
# latency: {profile: profiler-a100-80g.distserve.json}   # left out: tables or datasheet of the GPU

cluster:
  nodes:               # several GPU types at once: one line for each
    - {gpu: h200_sxm, nodes: 6, gpus_per_node: 8}   # usd_per_hour, watts: your own
  gpus_file: null      # your own GPU types, in the form that `pdserve gpus --example` prints
  network_gb_per_s: null   # one GPU to other nodes, one way, 1e9 bytes/s

workload:
  # trace: trace.csv   # ours, Azure's or Mooncake's, azure-code, azure-conv: in place of lengths
  # max_context_tokens: 1024   # shrink a trace's lengths to this, as pdserve bench does
  prompt_tokens: {distribution: lognormal, mean: 4000, cv: 1.0, max: 32000}
  output_tokens: {distribution: lognormal, mean: 500, cv: 0.5, max: 4000}
  # prefix: {share: 0.5, tokens: 1024, groups: 4}    # prompts that begin alike
  arrivals: drawn      # drawn: gamma gaps with the cv below; recorded: the trace's own gaps
  cv: 1.0              # of the gaps: 1 Poisson, 2 bursty
  rate: 20             # requests/s; goals cost, power and gpus need it
  diurnal: []          # relative rates over a day: the plan is made for the peak

slo:                   # one, or a list of classes with name and share of the requests
  ttft_s: 1.0
  tpot_s: 0.025
  attainment: 0.9      # share of the requests that must meet both; slo: splitwise: its nine limits

objective:
  goal: cost           # goodput_per_gpu, goodput (whole cluster); at a rate: cost, power, gpus
  spare_workers: 0     # 1: the promise must hold after the loss of any one worker (N+1)

# design:              # judge this instead of searching (the search still says what is better)
#   - {role: prefill, replicas: 12, tp: 2}
#   - {role: decode, replicas: 6, tp: 4}

search:
  tp: [1, 2, 3, 4, 8]  # parallelism that may be used
  pp: [1, 2]
  expert_parallel: true   # models with experts: also EP over the GPUs of a stage
  disaggregated: true
  colocated: true
  mixed: true          # prefill, decode and colocated workers together (rules pdserve)
  max_step_tokens: [512, 2048]   # prompt tokens in a step (rules pdserve)
  duration_s: 600      # of each simulated trace
  seeds: 5             # traces on which a plan is certified
  seed: 0
  tolerance: 0.01      # goodput is found to this share
  max_cell_gpus: 64    # larger clusters are planned as equal cells
  what_ifs: true
pdserve: {max_tokens_factor: 1.0, prefill_order: fcfs}   # see pdserve simulate --example
"""


class NodeGroup(Settings):
    """Nodes that are alike."""

    gpu: str = Field(description="a GPU type of `pdserve gpus`, of gpus_file, or of the profile")
    nodes: int = Field(1, ge=1, le=100_000)
    gpus_per_node: int | None = Field(None, ge=1, le=1024, description="left out: the usual number")
    usd_per_hour: Positive | None = Field(None, description="price of one GPU hour")
    watts: Positive | None = Field(None, description="of one GPU")


class ClusterInputs(Settings):
    nodes: tuple[NodeGroup, ...] = Field(min_length=1)
    gpus_file: str | None = None
    network_gb_per_s: Positive | None = None


class WorkloadInputs(Settings):
    trace: str | None = None
    max_context_tokens: int | None = Field(
        None, ge=2, description="prompt and output of a trace are shrunk to fit this together"
    )
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    prefix: SharedPrefix | None = None
    arrivals: Literal["drawn", "recorded"] = "drawn"
    cv: float = Field(1.0, ge=0, le=50)
    rate: Positive | None = None
    diurnal: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _has_lengths(self) -> "WorkloadInputs":
        has_lengths = self.prompt_tokens is not None and self.output_tokens is not None
        if self.trace is None and not has_lengths:
            raise ValueError("give trace, or both prompt_tokens and output_tokens")
        if self.trace is not None and (self.prompt_tokens or self.output_tokens or self.prefix):
            raise ValueError(
                "trace has its own lengths: give no prompt_tokens, output_tokens, prefix"
            )
        if self.trace is None and self.max_context_tokens is not None:
            raise ValueError("max_context_tokens needs a trace; distributions have their own max")
        if self.trace is None and self.arrivals == "recorded":
            raise ValueError("arrivals: recorded needs a trace")
        if self.diurnal and (min(self.diurnal) < 0 or max(self.diurnal) == 0):
            raise ValueError("diurnal: rates must be 0 or more, one of them above 0")
        return self

    def changed(
        self, *, cv: float | None = None, prompt_cv: float | None = None
    ) -> "WorkloadInputs":
        """The same with other burstiness, or with drawn prompts of another spread."""
        update: dict[str, object] = {}
        if cv is not None:
            update |= {"cv": cv, "arrivals": "drawn"}
        if prompt_cv is not None and self.prompt_tokens is not None:
            changed = {"cv": prompt_cv, "distribution": "lognormal"}
            update["prompt_tokens"] = self.prompt_tokens.model_copy(update=changed)
        return self.model_copy(update=update)

    @property
    def peak_rate(self) -> float | None:
        """The rate that the plan is made for."""
        if self.rate is None or not self.diurnal:
            return self.rate
        return self.rate * max(self.diurnal) * len(self.diurnal) / sum(self.diurnal)


Goal = Literal["goodput_per_gpu", "goodput", "cost", "power", "gpus"]
GOALS_AT_RATE = ("cost", "power", "gpus")


class ObjectiveInputs(Settings):
    goal: Goal = "goodput_per_gpu"
    spare_workers: int = Field(0, ge=0, le=1)


class DesignPool(Settings):
    """A pool of a design that is to be judged."""

    role: PoolRole
    replicas: int = Field(1, ge=1, le=100_000)
    gpu: str | None = None
    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    ep: int = Field(1, ge=1)


class SearchInputs(Settings):
    tp: tuple[int, ...] = Field((1, 2, 3, 4, 8), min_length=1)
    pp: tuple[int, ...] = Field((1, 2), min_length=1)
    expert_parallel: bool = True
    disaggregated: bool = True
    colocated: bool = True
    mixed: bool = True
    max_step_tokens: tuple[int, ...] = Field((512, 2048), min_length=1)
    duration_s: float = Field(600.0, ge=10, le=86_400)
    seeds: int = Field(5, ge=1, le=100)
    seed: int = Field(0, ge=0)
    tolerance: float = Field(0.01, ge=0.001, le=0.2)
    max_cell_gpus: int = Field(64, ge=1, le=4096)
    what_ifs: bool = True

    @model_validator(mode="after")
    def _some_kind(self) -> "SearchInputs":
        if not self.disaggregated and not self.colocated:
            raise ValueError("disaggregated and colocated are both off: nothing is left to search")
        if min(*self.tp, *self.pp, *self.max_step_tokens) < 1:
            raise ValueError("tp, pp and max_step_tokens must be 1 or more")
        return self


class PlanInputs(Settings):
    """All that a plan depends on."""

    model: str
    override_config: OverrideConfig = None
    weights: str | None = None
    kv: str | None = None
    rules: Rules = Rules.PDSERVE
    latency: LatencySettings | None = None
    cluster: ClusterInputs
    workload: WorkloadInputs
    slo: TrafficClass | tuple[TrafficClass, ...] | Literal["splitwise"]
    objective: ObjectiveInputs = ObjectiveInputs()
    design: tuple[DesignPool, ...] = ()
    search: SearchInputs = SearchInputs()
    pdserve: PdserveOptions = PdserveOptions()
    splitwise: SplitwiseOptions = SplitwiseOptions()

    @model_validator(mode="after")
    def _hangs_together(self) -> "PlanInputs":
        goal = self.objective.goal
        if goal in GOALS_AT_RATE and self.workload.rate is None:
            raise ValueError(f"objective.goal {goal} needs workload.rate")
        if self.slo == "splitwise" and self.rules is not Rules.SPLITWISE:
            raise ValueError("slo: splitwise needs rules: splitwise")
        if self.slo == "splitwise" and goal not in GOALS_AT_RATE:
            raise ValueError("slo: splitwise needs objective.goal cost, power or gpus")
        if self.rules is not Rules.PDSERVE and (self.latency is None or not self.latency.profile):
            raise ValueError(f"rules: {self.rules} need latency.profile")
        if isinstance(self.slo, tuple):
            if not self.slo:
                raise ValueError("slo: give at least one class")
            names = [item.name for item in self.slo]
            if len(set(names)) < len(names):
                raise ValueError(f"slo: classes need different names; got {', '.join(names)}")
        return self

    @property
    def classes(self) -> tuple[TrafficClass, ...]:
        if isinstance(self.slo, TrafficClass):
            return (self.slo,)
        return self.slo if isinstance(self.slo, tuple) else ()


PARTS: Mapping[str, type[Settings]] = {
    "slo": TrafficClass,
    "design": DesignPool,
    "cluster": ClusterInputs,
    "workload": WorkloadInputs,
    "objective": ObjectiveInputs,
    "search": SearchInputs,
    "pdserve": PdserveOptions,
    "splitwise": SplitwiseOptions,
}


def read_inputs(path: Path) -> PlanInputs:
    """Read the YAML; raises `LocalFault` naming field, rule and value."""
    return parse_inputs(read_yaml(path), source=str(path))


def parse_inputs(data: object, *, source: str) -> PlanInputs:
    """Check settings part by part, so that an unknown field is named with its neighbours."""
    if not isinstance(data, Mapping):
        raise LocalFault(f"{source}: expected a mapping; `pdserve plan --example` prints one")
    data = dict(data)
    if isinstance(data.get("latency"), Mapping):
        data["latency"] = {"model": data.get("model"), **data["latency"]}
        parse_settings(LatencySettings, data["latency"], source=f"{source}: latency")
    cluster = data.get("cluster")
    if isinstance(cluster, Mapping):
        check_parts(cluster, {"nodes": NodeGroup}, f"{source}: cluster.")
    check_parts(data, PARTS, f"{source}: ")
    return parse_settings(PlanInputs, data, source=source)
