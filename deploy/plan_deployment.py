"""From a plan file to what runs: its pools as workers, its limits as their settings."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from deploy.deployment import Deployment, PlacedWorker
from pdserve.config.base import lay_over, parse_settings
from pdserve.config.cluster import ClusterSettings
from pdserve.config.processes import RouterSettings, SloClass, WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault
from pdserve.domain.messages import Reads, Role
from placement.hardware import Gpu, find_gpu, load_gpus
from placement.plan import Plan, PlanPool
from placement.simulation.values import PoolRole, Rules

CPU_NAMES = frozenset({"cpu", "profiled"})
"""What a profile of workers without GPUs calls their type."""
ROLES: Mapping[PoolRole, tuple[Role, Reads]] = {
    PoolRole.PREFILL: (Role.PREFILL, Reads.OTHERS),
    PoolRole.DECODE: (Role.DECODE, Reads.NONE),
    PoolRole.COLOCATED: (Role.DECODE, Reads.OWN),
}
MIN_IN_FLIGHT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """How a plan is started where it is not taken as it stands."""

    settings: Mapping[str, object]  # fields of a cluster file by dotted name, over the plan's
    scale: float = 1.0  # of every pool's replicas, at least one each
    gpus_file: Path | None = None


class PlanOverrides(ClusterSettings):
    """Fields of a cluster file that are laid over a plan, which has pools and step times."""

    @model_validator(mode="after")
    def _timed_needs_coefficients(self) -> Self:
        return self  # each pool of the plan has its own


def deployment_of_plan(plan: Plan, options: PlanOptions, *, source: str) -> Deployment:
    """The plan's cluster; raises `LocalFault` naming field and rule.

    Pools that a laptop cannot hold are scaled down by `options.scale`; `notes` say so.
    """
    if not 0 < options.scale <= 1:
        raise LocalFault(f"scale must be above 0 and at most 1; got {options.scale:g}")
    gpus = load_gpus(options.gpus_file)
    types = {pool.gpu: _gpu_of(pool, gpus) for pool in plan.pools}
    override = plan.override_config
    said = {} if override is None else {"override_config": override.model_dump(exclude_none=True)}
    laid = lay_over(said, options.settings.items())
    given = parse_settings(PlanOverrides, laid, source=source)
    workers = tuple(_workers(plan, options.scale, types, given, source))
    return Deployment(
        router=_router(plan, given, source),
        workers=workers,
        start_s=given.start_s,
        log_dir=given.log_dir,
        share_gpus=given.share_gpus,
        plan=plan,
        notes=tuple(_notes(plan, options, workers)),
    )


def _router(plan: Plan, given: PlanOverrides, source: str) -> RouterSettings:
    limits = plan.limits
    num_decode = sum(pool.replicas for pool in plan.pools if pool.role is not PoolRole.PREFILL)
    most = limits.max_num_requests * plan.cells * num_decode + limits.max_num_waiting
    own = given.router_data(only_given=True)
    return parse_settings(
        RouterSettings,
        {
            "model": plan.model,
            "policy": plan.policy,
            "max_num_requests": max(most, MIN_IN_FLIGHT),
            "max_num_waiting": limits.max_num_waiting,
            "max_wait_s": limits.max_wait_s,
            "max_rate": limits.max_rate,
            "max_burst": limits.max_burst,
            "slo": [item.model_dump(include=set(SloClass.model_fields)) for item in plan.slo],
            **own,
            "timers": _timers(plan, own),
        },
        source=source,
    )


def _timers(plan: Plan, own: Mapping[str, Any]) -> dict[str, float]:
    """Workers keep requests for as long as the router lets them wait."""
    return {"queue_s": max(Timers().queue_s, plan.limits.max_wait_s), **own.get("timers", {})}


def _workers(
    plan: Plan, scale: float, types: Mapping[str, Gpu | None], given: PlanOverrides, source: str
) -> Iterator[PlacedWorker]:
    is_on_gpus = any(types.values())
    numbers = {role: itertools.count() for role in Role}
    for pool in plan.pools:
        template = _worker(plan, pool, given, source, is_on_gpus=is_on_gpus)
        gpu = types[pool.gpu]
        for index in range(max(1, round(plan.cells * pool.replicas * scale))):
            yield PlacedWorker(
                settings=given.pool(template.role).nth(template, next(numbers[template.role])),
                gpu=gpu.name if gpu else "",
                gpus_per_node=gpu.gpus_per_node if gpu else 0,
                node=_node(pool, index),
            )


def _worker(
    plan: Plan, pool: PlanPool, given: PlanOverrides, source: str, *, is_on_gpus: bool
) -> WorkerSettings:
    """Of each worker of a pool: the plan's, unless the caller gave it."""
    limits = plan.limits
    role, reads = ROLES[pool.role]
    own = given.worker_data(role, only_given=True)
    block_size = own["engine"].get("block_size") or pool.block_size or plan.block_size
    engine: dict[str, object] = {
        "model": plan.model,
        "device": "cuda" if is_on_gpus else "cpu",
        "dtype": "bfloat16" if is_on_gpus else "float32",
        "block_size": block_size,
        "tp": pool.tp,
        "pp": pool.pp,
    }
    if pool.kv_tokens:
        engine["num_blocks"] = max(pool.kv_tokens // block_size, 1)
    if given.engine == "timed" and given.coefficients is None:
        if pool.step_times is None:
            raise LocalFault(
                f"{source}: engine timed needs step_times of every pool: plan again, or give "
                "--set coefficients={...}"
            )
        engine["coefficients"] = pool.step_times
    data: dict[str, object] = {
        "max_step_tokens": limits.max_step_tokens,
        "max_num_requests": limits.max_num_requests,
    }
    if limits.max_num_waiting:
        # The router refuses first: a worker's own queue must hold what it lets in.
        data["max_num_queued"] = limits.max_num_waiting
    if pool.queue_order:
        data["queue_order"] = pool.queue_order
    if role is Role.DECODE:
        # The plan's prediction has each phase in its own pool.
        data["max_local_prefill_tokens"] = 0
    data |= own | {"reads": reads, "engine": engine | own["engine"], "timers": _timers(plan, own)}
    return parse_settings(WorkerSettings, data, source=source)


def _node(pool: PlanPool, index: int) -> str:
    """Where the plan puts worker `index`; later cells are like the first, on nodes of their own."""
    if not pool.nodes:
        return ""
    cell, place = divmod(index, pool.replicas)
    node = pool.nodes[min(place, len(pool.nodes) - 1)]
    return node if cell == 0 else f"cell {cell} {node}"


def _notes(plan: Plan, options: PlanOptions, workers: Sequence[PlacedWorker]) -> Iterator[str]:
    planned = sum(plan.cells * pool.replicas for pool in plan.pools)
    if len(workers) < planned:
        yield (
            f"scaled to {options.scale:g}: {len(workers)} of the plan's {planned} workers; "
            "its prediction is for all of them"
        )
    engine = workers[0].settings.engine
    is_gpu_plan = engine.device == "cpu" and any(p.gpu not in CPU_NAMES for p in plan.pools)
    if is_gpu_plan and engine.engine == "torch":
        yield "the plan is for GPUs: its prediction does not hold on the CPU"
    if engine.engine == "timed" and any(pool.pp > 1 for pool in plan.pools):
        yield "timed engines have one step under way: with several stages they are too slow"
    if plan.rules != Rules.PDSERVE:
        yield f"the plan was made under rules {plan.rules}: the workers here follow rules pdserve"
    roles = {pool.role for pool in plan.pools}
    if PoolRole.COLOCATED in roles and len(roles) > 1:
        yield "colocated workers beside prefill workers read all prompts that they get themselves"


def _gpu_of(pool: PlanPool, gpus: Mapping[str, Gpu]) -> Gpu | None:
    if pool.gpu in CPU_NAMES:
        return None
    try:
        return find_gpu(pool.gpu, gpus)
    except LocalFault as fault:
        raise LocalFault(f"{fault.message}; --gpus-file names your own types") from None
