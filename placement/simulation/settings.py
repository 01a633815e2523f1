"""`sim.yaml`: the text form of a `SimulationConfig`, with latencies looked up."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pdserve.config.base import Settings, parse_settings, read_yaml
from pdserve.domain.errors import LocalFault
from placement.fitted_profile import FittedProfile
from placement.profiles import (
    DistserveProfile,
    Profile,
    SplitwiseProfile,
    distserve_kv_bytes_per_token,
    load_fitted,
    load_profile,
)
from placement.simulation.timing import SplitwiseTiming, StepTiming
from placement.simulation.values import (
    Link,
    PdserveOptions,
    Pool,
    PoolRole,
    Rules,
    SimulationConfig,
    SplitwiseOptions,
    TrafficClass,
)

EXAMPLE = """\
# One cluster on one workload: pdserve simulate --config sim.yaml --workload w.csv
rules: pdserve        # pdserve: our router and workers; distserve, splitwise: the published ones
latency:              # a published profile, or a GPU of `pdserve gpus` and a Hugging Face config
  profile: profiler-a100-80g.distserve.json
  model: facebook/opt-13b
pools:
  - {role: prefill, replicas: 2, tp: 2}    # pp, gpu and max_num_tokens may be given for each pool
  - {role: decode, replicas: 3, tp: 1}     # role: colocated does both
slo: {ttft_s: 0.2, tpot_s: 0.1, attainment: 0.9}   # or a list of classes with name and share
arrivals: {rate: 4.0} # requests/s; left out: recorded times; {concurrency: 32}: closed loop
pdserve: {max_step_tokens: 512, max_num_requests: 64}
"""


class LatencySettings(Settings):
    """Where step times come from: a profile file, or a GPU type."""

    model: str = Field(description="name in the profile, or config.json, its folder, or a name")
    profile: str | None = Field(None, description="file, or one that comes with pdserve")
    gpu: str | None = Field(None, description="GPU type; pools may name their own")

    @model_validator(mode="after")
    def _one_source(self) -> "LatencySettings":
        if self.profile is not None and self.gpu is not None:
            raise ValueError("give profile or gpu, not both")
        return self


class SimulatedLatency(LatencySettings):
    """With a GPU type also what the weights are stored in and who serves them."""

    weights: str | None = Field(None, description="bf16, fp8, int8, ...; None: as the config says")
    kv: str | None = Field(None, description="bf16 or fp8; None: as the config says")
    framework: str = Field("pdserve", description="whose host times: pdserve, vllm, sglang, trtllm")

    @model_validator(mode="after")
    def _profiles_have_their_own(self) -> "SimulatedLatency":
        given = self.weights or self.kv or self.framework != "pdserve"
        if self.profile is not None and given:
            raise ValueError("weights, kv and framework go with gpu, not with profile")
        return self


class PoolSettings(Settings):
    role: PoolRole
    replicas: int = Field(1, ge=1, le=100_000)
    tp: int | None = Field(None, ge=1, description="1; under rules splitwise 8")
    pp: int = Field(1, ge=1, le=64)
    gpu: str | None = None
    max_num_tokens: int | None = Field(None, ge=1, description="KV tokens that an instance holds")
    link_gb_per_s: float | None = Field(None, gt=0, description="KV link, 1e9 bytes per second")


class ArrivalSettings(Settings):
    rate: float | None = Field(None, gt=0, description="requests/s")
    concurrency: int | None = Field(None, ge=1, description="closed loop")

    @model_validator(mode="after")
    def _one_of_them(self) -> "ArrivalSettings":
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("give rate or concurrency, not both")
        return self


class SimulationSettings(Settings):
    rules: Rules = Rules.PDSERVE
    latency: SimulatedLatency
    pools: tuple[PoolSettings, ...] = Field(min_length=1)
    slo: TrafficClass | tuple[TrafficClass, ...] | None = None
    arrivals: ArrivalSettings | Literal["recorded"] | None = None
    pdserve: PdserveOptions = PdserveOptions()
    splitwise: SplitwiseOptions = SplitwiseOptions()

    @model_validator(mode="after")
    def _closed_loop_is_ours(self) -> "SimulationSettings":
        arrivals = self.arrivals
        is_closed = isinstance(arrivals, ArrivalSettings) and arrivals.concurrency is not None
        if is_closed and self.rules is not Rules.PDSERVE:
            raise ValueError(f"arrivals.concurrency needs rules: pdserve; got {self.rules}")
        return self


PARTS: Mapping[str, type[Settings]] = {
    "pools": PoolSettings,
    "slo": TrafficClass,
    "arrivals": ArrivalSettings,
}


def check_parts(
    data: Mapping[str, object], kinds: Mapping[str, type[Settings]], prefix: str
) -> None:
    """Each part alone, lists item by item: an unknown field is named with its neighbours."""
    for name, kind in kinds.items():
        part = data.get(name)
        if isinstance(part, Mapping):
            parse_settings(kind, part, source=f"{prefix}{name}")
        for index, item in enumerate(part if isinstance(part, list) else ()):
            parse_settings(kind, item, source=f"{prefix}{name}[{index}]")


def read_config(path: Path) -> SimulationConfig:
    """Read `sim.yaml`; raises `LocalFault` naming field, rule and value."""
    return parse_config(read_yaml(path), source=str(path), folder=path.parent)


def parse_config(data: object, *, source: str, folder: Path | None = None) -> SimulationConfig:
    """Check and resolve settings; file names in them are relative to `folder`."""
    if isinstance(data, Mapping):
        check_parts(data, PARTS, f"{source}: ")
    settings = parse_settings(SimulationSettings, data, source=source)
    arrivals = settings.arrivals
    if not isinstance(arrivals, ArrivalSettings):
        arrivals = ArrivalSettings()
    slo = settings.slo
    classes = slo if isinstance(slo, tuple) else (slo,) if slo is not None else ()
    fitted = None
    if settings.rules is Rules.PDSERVE:
        fitted = load_fitted(settings.latency.profile, settings.latency.model, folder=folder)
    pdserve = resolve_options(settings.pdserve, fitted)
    return SimulationConfig(
        rules=settings.rules,
        pools=_resolve_pools(settings, pdserve, fitted, source, folder),
        slo=_named(classes),
        rate=arrivals.rate,
        concurrency=arrivals.concurrency,
        pdserve=pdserve,
        splitwise=settings.splitwise,
    )


def _named(classes: tuple[TrafficClass, ...]) -> tuple[TrafficClass, ...]:
    """Classes by their names; several without one are class 0, class 1, ..."""
    has_no_names = len(classes) > 1 and all("name" not in c.model_fields_set for c in classes)
    return tuple(
        item.model_copy(update={"name": f"class {index}"} if has_no_names else None)
        for index, item in enumerate(classes)
    )


def resolve_options(given: PdserveOptions, fitted: FittedProfile | None) -> PdserveOptions:
    """What is given; what that leaves out a fitted profile knows, or is the default."""
    if fitted is None:
        return given
    return fitted.options().model_copy(update=given.model_dump(exclude_unset=True))


def _resolve_pools(
    settings: SimulationSettings,
    options: PdserveOptions,
    fitted: FittedProfile | None,
    source: str,
    folder: Path | None,
) -> tuple[Pool, ...]:
    latency = settings.latency
    if fitted is not None:
        return tuple(_fitted_pool(pool, fitted, source) for pool in settings.pools)
    if latency.profile is not None:
        profile = load_profile(latency.profile, folder=folder)
        return tuple(_profiled_pool(pool, profile, settings, source) for pool in settings.pools)
    if settings.rules is not Rules.PDSERVE:
        raise LocalFault(f"{source}: latency.profile: rules {settings.rules} need a profile")
    return tuple(_modelled_pool(pool, latency, options, source, folder) for pool in settings.pools)


def _fitted_pool(pool: PoolSettings, fitted: FittedProfile, source: str) -> Pool:
    ranks = fitted.ranks(pool.role)
    if (pool.tp or ranks.tp, pool.pp) != (ranks.tp, ranks.pp):
        raise LocalFault(
            f"{source}: pools: {pool.role}: {fitted.model} was profiled at {ranks}; "
            f"got tp {pool.tp or ranks.tp} pp {pool.pp}"
        )
    known = fitted.pool(pool.role, pool.replicas)
    link = known.link
    if pool.link_gb_per_s is not None:
        link = replace(link, bytes_per_s=pool.link_gb_per_s * 1e9)
    return replace(
        known,
        gpu=pool.gpu or known.gpu,
        kv_tokens=pool.max_num_tokens or known.kv_tokens,
        link=link,
    )


def _profiled_pool(
    pool: PoolSettings, profile: Profile, settings: SimulationSettings, source: str
) -> Pool:
    model = settings.latency.model
    link = Link(bytes_per_s=pool.link_gb_per_s * 1e9) if pool.link_gb_per_s else Link()
    plain = partial(Pool, role=pool.role, replicas=pool.replicas, pp=pool.pp, link=link)
    if isinstance(profile, DistserveProfile):
        if settings.rules is Rules.SPLITWISE:
            raise LocalFault(f"{source}: latency.profile: rules splitwise need Splitwise's CSV")
        tp = pool.tp or 1
        fit = profile.timing(model, tp=tp, pp=pool.pp, max_num_tokens=pool.max_num_tokens)
        return plain(
            timing=fit,
            tp=tp,
            gpu=pool.gpu or "A100-80G",
            kv_tokens=fit.max_num_tokens,
            kv_bytes_per_token=distserve_kv_bytes_per_token(model),
        )
    assert isinstance(profile, SplitwiseProfile)
    if settings.rules is Rules.DISTSERVE:
        raise LocalFault(f"{source}: latency.profile: rules distserve need DistServe's JSON")
    if pool.gpu is None:
        raise LocalFault(f"{source}: pools: {pool.role}: gpu is needed with Splitwise's profile")
    timing: SplitwiseTiming = profile.timing(model, hardware=pool.gpu, tp=pool.tp or 8)
    return plain(
        timing=timing,
        tp=pool.tp or 8,
        gpu=pool.gpu,
        kv_tokens=pool.max_num_tokens or timing.kv_tokens,
        kv_bytes_per_token=timing.kv_bytes_per_token,
    )


def _modelled_pool(
    pool: PoolSettings,
    latency: SimulatedLatency,
    options: PdserveOptions,
    source: str,
    folder: Path | None,
) -> Pool:
    """From the planner's own latency model: measured tables or the datasheet."""
    from placement.framework import find_framework
    from placement.hardware import find_gpu, network_link
    from placement.latency import composed_latency, kv_capacity_tokens
    from placement.model_config import load_model, with_quantisation
    from placement.model_spec import Parallelism

    name = pool.gpu or latency.gpu
    if name is None:
        raise LocalFault(f"{source}: latency: give profile, or gpu here or in each pool")
    path = (folder or Path()) / latency.model
    spec = load_model(path if path.exists() else latency.model)
    weights = latency.weights or "bf16"
    spec = with_quantisation(spec, weights=latency.weights, kv=latency.kv)
    gpu, tp = find_gpu(name), pool.tp or 1
    parallelism = Parallelism(tp=tp, pp=pool.pp)
    framework = find_framework(latency.framework, weights, gpu.name)
    model = composed_latency(spec, gpu, parallelism, framework)
    kv_tokens = pool.max_num_tokens or kv_capacity_tokens(spec, gpu, parallelism)
    if kv_tokens == 0:
        raise LocalFault(
            f"{source}: pools: {spec.name} does not fit {gpu.name} at tp {tp} pp {pool.pp}"
        )
    network = network_link(gpu)
    bytes_per_s = pool.link_gb_per_s * 1e9 if pool.link_gb_per_s else network.bytes_per_s * tp
    return Pool(
        role=pool.role,
        replicas=pool.replicas,
        timing=StepTiming.of_model(
            model, max_num_requests=options.max_num_requests, source=str(model.source)
        ),
        tp=tp,
        pp=pool.pp,
        gpu=gpu.name,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=spec.kv_bytes_per_token(),
        link=Link(bytes_per_s=bytes_per_s, latency_s=network.latency_s),
        prompt_s=model.grid.prompt_s,
        prompt_token_s=model.grid.prompt_token_s,
    )
