"""From a plan file to what runs: its pools as workers, its limits as their settings."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.deployment import Deployment, PlacedWorker
from pdserve.config.base import lay_over, parse_settings
from pdserve.config.cluster import ClusterSettings
from pdserve.config.processes import CoefficientSettings, ReadsName, WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault
from placement.hardware import Gpu, find_gpu, load_gpus
from placement.plan import Plan, PlanPool
from placement.simulation.values import PoolRole, Rules

CPU_NAMES = frozenset({"cpu", "profiled"})
"""What a profile of workers without GPUs calls their type."""
READS: Mapping[PoolRole, ReadsName] = {
    PoolRole.PREFILL: "others",
    PoolRole.DECODE: "none",
    PoolRole.COLOCATED: "own",
}
MIN_IN_FLIGHT = 1024

Role = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """How a plan is started where it is not taken as it stands."""

    settings: Mapping[str, object]  # fields of a cluster file by dotted name, over the plan's
    scale: float = 1.0  # of every pool's replicas, at least one each
    gpus_file: Path | None = None


def deployment_of_plan(plan: Plan, options: PlanOptions, *, source: str) -> Deployment:
    """The plan's cluster; raises `LocalFault` naming field and rule.

    Pools that a laptop cannot hold are scaled down by `options.scale`; `notes` say so.
    """
    if not 0 < options.scale <= 1:
        raise LocalFault(f"scale must be above 0 and at most 1; got {options.scale:g}")
    gpus = load_gpus(options.gpus_file)
    types = {pool.gpu: _gpu_of(pool, gpus) for pool in plan.pools}
    settings = _settings(plan, options, types, source)
    workers = tuple(_workers(plan, options, types, settings))
    return Deployment(
        router=settings.router_settings(),
        workers=workers,
        start_s=settings.start_s,
        log_dir=settings.log_dir,
        plan=plan,
        notes=tuple(_notes(plan, options, settings, len(workers))),
    )


def _settings(
    plan: Plan, options: PlanOptions, types: Mapping[str, Gpu | None], source: str
) -> ClusterSettings:
    """What all workers share, with what the caller lays over it."""
    limits = plan.limits
    most = limits.max_num_requests * _num_workers(plan, PoolRole.DECODE, PoolRole.COLOCATED)
    pool = {
        "max_step_tokens": limits.max_step_tokens,
        "max_num_requests": limits.max_num_requests,
    }
    if limits.max_num_waiting:
        # The router refuses first: a worker's own queue must hold what it lets in, for as long.
        pool["max_num_waiting"] = limits.max_num_waiting
    data: dict[str, object] = {
        "model": plan.model,
        "block_size": plan.block_size,
        "device": "cpu" if all(gpu is None for gpu in types.values()) else "cuda",
        "dtype": "float32" if all(gpu is None for gpu in types.values()) else "bfloat16",
        "router": {
            "policy": plan.policy,
            "max_num_requests": max(most + limits.max_num_waiting, MIN_IN_FLIGHT),
            "max_num_waiting": limits.max_num_waiting,
            "max_wait_s": limits.max_wait_s,
            "max_rate": limits.max_rate,
            "max_burst": limits.max_burst,
            "slo": [item.model_dump(exclude={"share"}) for item in plan.slo],
        },
        "timers": {"queue_s": max(Timers().queue_s, limits.max_wait_s)},
        "prefill": pool,
        "decode": pool,
    }
    if plan.override_config is not None:
        data["override_config"] = plan.override_config.model_dump(exclude_none=True)
    laid = lay_over(data, options.settings.items())
    assert isinstance(laid, dict)
    if laid.get("engine") == "timed" and "coefficients" not in laid:
        laid["coefficients"] = _first_step_times(plan, source).model_dump()
    return parse_settings(ClusterSettings, laid, source=source)


def _first_step_times(plan: Plan, source: str) -> CoefficientSettings:
    known = [pool.step_times for pool in plan.pools if pool.step_times is not None]
    if len(known) < len(plan.pools):
        raise LocalFault(
            f"{source}: engine timed needs step_times of every pool: plan again, or give "
            "--set coefficients={...}"
        )
    return known[0]


def _workers(
    plan: Plan,
    options: PlanOptions,
    types: Mapping[str, Gpu | None],
    settings: ClusterSettings,
) -> Iterator[PlacedWorker]:
    templates = {each.role: each for each in settings.worker_settings("")}
    numbers = {role: itertools.count() for role in templates}
    for pool in plan.pools:
        role: Role = "prefill" if pool.role is PoolRole.PREFILL else "decode"
        template = _of_pool(templates[role], pool, plan, options.settings)
        gpu = types[pool.gpu]
        for index in range(_scaled(plan.cells * pool.replicas, options.scale)):
            number = next(numbers[role])
            own = {
                "worker_id": f"{role}-{number}",
                "metrics_port": settings.pool(role).nth_metrics_port(number),
            }
            yield PlacedWorker(
                settings=template.model_copy(update=own),
                gpu=gpu.name if gpu else "",
                gpus_per_node=gpu.gpus_per_node if gpu else 0,
                node=_node(pool, index),
            )


def _of_pool(
    template: WorkerSettings, pool: PlanPool, plan: Plan, given: Mapping[str, object]
) -> WorkerSettings:
    """The role's settings with what is the pool's own, unless the caller gave it."""
    engine: dict[str, object] = {"tp": pool.tp, "pp": pool.pp}
    if pool.kv_tokens and f"{template.role}.num_blocks" not in given:
        engine["num_blocks"] = max(pool.kv_tokens // plan.block_size, 1)
    if template.engine.engine == "timed" and pool.step_times and "coefficients" not in given:
        engine["coefficients"] = pool.step_times
    update: dict[str, object] = {"engine": template.engine.model_copy(update=engine)}
    update["reads"] = READS[pool.role]
    if pool.queue_order and f"{template.role}.queue_order" not in given:
        update["queue_order"] = pool.queue_order
    if template.role == "decode" and "decode.max_local_prefill_tokens" not in given:
        # The plan's prediction has each phase in its own pool.
        update["max_local_prefill_tokens"] = 0
    return template.model_copy(update=update)


def _node(pool: PlanPool, index: int) -> str:
    """Where the plan puts worker `index`; later cells are like the first, on nodes of their own."""
    if not pool.nodes:
        return ""
    cell, place = divmod(index, pool.replicas)
    node = pool.nodes[min(place, len(pool.nodes) - 1)]
    return node if cell == 0 else f"cell {cell} {node}"


def _notes(
    plan: Plan, options: PlanOptions, settings: ClusterSettings, num_workers: int
) -> Iterator[str]:
    planned = sum(plan.cells * pool.replicas for pool in plan.pools)
    if num_workers < planned:
        yield (
            f"scaled to {options.scale:g}: {num_workers} of the plan's {planned} workers; "
            "its prediction is for all of them"
        )
    is_gpu_plan = settings.device == "cpu" and any(p.gpu not in CPU_NAMES for p in plan.pools)
    if is_gpu_plan and settings.engine == "torch":
        yield "the plan is for GPUs: its prediction does not hold on the CPU"
    if settings.engine == "timed" and any(pool.pp > 1 for pool in plan.pools):
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


def _num_workers(plan: Plan, *roles: PoolRole) -> int:
    return plan.cells * sum(pool.replicas for pool in plan.pools if pool.role in roles)


def _scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))
