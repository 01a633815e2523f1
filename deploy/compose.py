"""A deployment as a Docker Compose project on one machine.

clients ──▶ 127.0.0.1:7450 ──▶ router ──┐ network `cluster`, which has no way out
                              prefill-0 ┤
                              decode-0  ┘
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from deploy.deployment import Deployment, PlacedWorker
from deploy.kubernetes.pods import SCRATCH_ENV, USER_ID
from deploy.kubernetes.pools import Pool, pools_of
from deploy.kubernetes.settings_files import router_settings, settings_file, worker_settings
from deploy.kubernetes.sizing import model_spec, size_of
from deploy.kubernetes.values import (
    CONFIG_DIR,
    INTERNAL_PORT,
    MODELS_DIR,
    ROUTER_PORT,
    WORKER_PORT,
    PlainDumper,
    RenderOptions,
)
from deploy.processes import MODULES
from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault
from placement.plan import format_plan

Service = dict[str, Any]

ROUTER = "router"
KILL_MARGIN_S = 10
ROUTER_SCRATCH = "64m"
PIDS_LIMIT = 512  # processes and threads of one rank


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeOptions(RenderOptions):
    """Choices that are not the plan's."""

    models_dir: str = ""  # a folder of this machine, mounted read-only at /models


def render_compose(deployment: Deployment, options: ComposeOptions) -> dict[str, str]:
    """Relative path to text; raises `LocalFault` for what one machine cannot hold."""
    pools = pools_of(deployment.workers)
    _check_one_machine(deployment.workers)
    spec = model_spec(deployment)
    services: dict[str, Service] = {ROUTER: _router(deployment, options)}
    settings = {
        f"{ROUTER}.yaml": settings_file(
            router_settings(deployment, num_routers=1),
            left_out=("router_id",),
            about=(f"python -m router --settings {CONFIG_DIR}/router.yaml",),
        )
    }
    first_gpu = 0
    for pool in pools:
        size = size_of(pool, spec)
        own = worker_settings(pool, options).model_copy(
            update={"routers": (f"{ROUTER}:{INTERNAL_PORT}",)}
        )
        settings[f"{pool.name}.yaml"] = settings_file(
            own,
            left_out=("worker_id", "host", "cpus"),
            about=(f"Each {pool.role} worker of pool {pool.name}; its service sets its name.",),
        )
        for index in range(pool.replicas):
            name = f"{pool.name}-{index}"
            gpus = range(first_gpu, first_gpu + pool.num_gpus)
            first_gpu += pool.num_gpus
            service = _worker(name, pool, options, size.memory_bytes, size.cpu)
            service["tmpfs"] = [f"/tmp:size={math.ceil(size.scratch_bytes / 2**20)}m,mode=1777"]
            if size.shm_bytes:
                service["shm_size"] = f"{math.ceil(size.shm_bytes / 2**20)}m"
            if pool.num_gpus:
                service["deploy"] = _devices(gpus)
            services[name] = service
    services["smoke"] = _smoke(options)
    files = {f"settings/{path}": text for path, text in settings.items()}
    if deployment.plan is not None:
        files["settings/plan.yaml"] = format_plan(deployment.plan)
    files["compose.yaml"] = _compose_text(options, services, settings)
    return files


def _router(deployment: Deployment, options: ComposeOptions) -> Service:
    service = _service(
        options.image_router,
        ["python", "-m", "router", "--settings", f"{CONFIG_DIR}/{ROUTER}.yaml"],
        config=ROUTER,
        timers=deployment.router.timers,
        options=options,
    )
    return {
        **service,
        "networks": ["clients", "cluster"],
        # Only this machine: the port has neither TLS nor login.
        "ports": [f"127.0.0.1:{ROUTER_PORT}:{ROUTER_PORT}"],
        "healthcheck": _healthcheck(f"127.0.0.1:{ROUTER_PORT}", start_s=60),
        "tmpfs": [f"/tmp:size={ROUTER_SCRATCH},mode=1777"],
        "mem_limit": "2g",
        "cpus": 2.0,
    }


def _worker(
    name: str, pool: Pool, options: ComposeOptions, memory_bytes: int, cpu: float
) -> Service:
    command = ["python", "-m", MODULES[pool.role], "--settings", f"{CONFIG_DIR}/{pool.name}.yaml"]
    # Its service's name is its address in the network `cluster`.
    command += ["--set", f"worker_id={name}", "--set", f"host={name}"]
    service = _service(
        options.image_worker,
        command,
        config=pool.name,
        timers=pool.settings.timers,
        options=options,
    )
    service["environment"] = SCRATCH_ENV | pool.thread_env
    return {
        **service,
        "pids_limit": PIDS_LIMIT * pool.ranks_per_pod,
        "networks": ["cluster"],
        "healthcheck": _healthcheck(f"{name}:{WORKER_PORT}", start_s=300),
        "mem_limit": f"{math.ceil(memory_bytes / 2**20)}m",
        "cpus": cpu,
    }


def _smoke(options: ComposeOptions) -> Service:
    """`docker compose run --rm smoke`, which asks from the clients' network."""
    return {
        "image": options.image_router,
        "command": ["pdserve", "smoke", "--address", f"{ROUTER}:{ROUTER_PORT}"],
        "profiles": ["smoke"],
        "networks": ["clients"],
        "mem_limit": "512m",
        "cpus": 1.0,
        "tmpfs": [f"/tmp:size={ROUTER_SCRATCH},mode=1777"],
        "environment": SCRATCH_ENV,
        **_locked_down(),
    }


def _service(
    image: str,
    command: Sequence[str],
    *,
    config: str,
    timers: Timers,
    options: ComposeOptions,
) -> Service:
    service: Service = {
        "image": image,
        "command": list(command),
        "configs": [{"source": config, "target": f"{CONFIG_DIR}/{config}.yaml"}],
        "environment": SCRATCH_ENV,
        "restart": "unless-stopped",
        "stop_grace_period": f"{math.ceil(timers.drain_s) + KILL_MARGIN_S}s",
        **_locked_down(),
    }
    if options.models_dir:
        service["volumes"] = [
            {
                "type": "bind",
                "source": options.models_dir,
                "target": MODELS_DIR,
                "read_only": True,
            }
        ]
    return service


def _locked_down() -> Service:
    return {
        "user": f"{USER_ID}:{USER_ID}",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "pids_limit": PIDS_LIMIT,
        "init": True,
    }


def _healthcheck(address: str, *, start_s: int) -> Service:
    return {
        "test": ["CMD", "python", "-m", "pdserve.rpc.probe", address],
        "interval": "10s",
        "timeout": "5s",
        "retries": 3,
        "start_period": f"{start_s}s",
    }


def _devices(gpus: range) -> Service:
    device = {
        "driver": "nvidia",
        "device_ids": [str(gpu) for gpu in gpus],
        "capabilities": ["gpu"],
    }
    return {"resources": {"reservations": {"devices": [device]}}}


def _check_one_machine(workers: Sequence[PlacedWorker]) -> None:
    gpus = sum(worker.num_gpus for worker in workers if worker.computes_on_gpus)
    most = max((worker.gpus_per_node for worker in workers), default=0)
    types = {worker.gpu for worker in workers if worker.gpu}
    if len(types) > 1:
        raise LocalFault(
            f"the plan uses {len(types)} types of GPU, and Compose runs on one machine: render "
            "kubernetes, or scale it with --scale"
        )
    if any(name.startswith("mi") for name in types):
        raise LocalFault("Compose hands out NVIDIA GPUs only; for AMD's render kubernetes")
    if gpus > most > 0:
        raise LocalFault(
            f"the plan uses {gpus} GPUs and one machine has {most}, while Compose runs on one: "
            "render kubernetes, or scale it with --scale"
        )


def _compose_text(
    options: ComposeOptions, services: Mapping[str, Service], settings: Mapping[str, str]
) -> str:
    head = (
        "# docker compose up --wait, then: docker compose run --rm smoke\n"
        "# No TLS, no login: the workers' network has no way out, and the router's port is "
        "published on\n# 127.0.0.1 alone.\n"
    )
    configs = {path.removesuffix(".yaml"): {"file": f"./settings/{path}"} for path in settings}
    data = {
        "name": options.name,
        "services": dict(services),
        "networks": {"clients": {}, "cluster": {"internal": True}},
        "configs": configs,
    }
    return head + yaml.dump(data, Dumper=PlainDumper, sort_keys=False, width=100)
