"""The settings files that pods start with, and what each pod adds to its file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from deploy.deployment import Deployment
from deploy.kubernetes.pools import Pool
from deploy.kubernetes.values import (
    INTERNAL_PORT,
    KV_PORT,
    METRICS_PORT,
    RANKS_PORT,
    ROUTER_PORT,
    WORKER_PORT,
    RenderOptions,
)
from pdserve.config.processes import RouterSettings, WorkerSettings
from pdserve.domain.errors import LocalFault

INSECURE_WARNING = (
    "insecure: true lets the process listen where other pods reach it, without TLS and login.",
    "What keeps others out are the NetworkPolicies: run it only where the network enforces them.",
)
POD_SETS_WORKER = ("worker_id=$(POD_NAME)", "host=$(POD_IP)")
"""Peers dial a worker where it listens, so that must be its own address."""
POD_SETS_GROUP = (
    "worker_id={name}-$(PDSERVE_GROUP)",
    "host=$(POD_IP)",
    "ranks.node=$(PDSERVE_NODE_RANK)",
    "ranks.per_node={per_node}",
    f"ranks.leader=$(LWS_LEADER_ADDRESS):{RANKS_PORT}",
)
"""All pods of a worker that spans nodes have its name, which is that of its first pod."""
POD_SETS_ROUTER = ("router_id=$(POD_NAME)",)

LOG_FILE_FIELDS = ("log_file", "max_log_bytes", "num_log_files")
"""A container logs to its standard error, which its runtime keeps."""


def router_settings(deployment: Deployment, *, num_routers: int) -> RouterSettings:
    """Of each router. Clients spread over all, so each enforces its share of the limits."""
    router = deployment.router
    waiting, rate = router.max_num_waiting, router.max_rate
    return router.model_copy(
        update={
            "host": "0.0.0.0",
            "insecure": True,
            "port": ROUTER_PORT,
            "internal_port": INTERNAL_PORT,
            "metrics_port": METRICS_PORT,
            "max_num_requests": _share(router.max_num_requests, num_routers),
            "max_num_waiting": _share(waiting, num_routers) if waiting else waiting,
            # Not the burst: nothing says that it spreads as evenly as the long run.
            "max_rate": rate / num_routers if rate else rate,
        }
    )


def pod_assignments(pool: Pool, options: RenderOptions) -> tuple[str, ...]:
    """What a pod of `pool` sets itself, as NAME=VALUE."""
    if not pool.is_multi_node:
        return POD_SETS_WORKER
    name = f"{options.name}-{pool.name}"
    return tuple(
        text.replace("{name}", name).replace("{per_node}", str(pool.ranks_per_pod))
        for text in POD_SETS_GROUP
    )


def worker_settings(pool: Pool, options: RenderOptions) -> WorkerSettings:
    """Of each worker of `pool`; the pod sets name and address.

    Raises `LocalFault` for one GPU by its number: each container has GPUs of its own.
    """
    if ":" in pool.settings.engine.device:
        raise LocalFault(
            f"device {pool.settings.engine.device}: containers see GPUs of their own, counted from "
            "0: give device: cuda"
        )
    return pool.settings.model_copy(
        update={
            "insecure": True,
            "port": WORKER_PORT,
            "kv_port": KV_PORT,
            "metrics_port": METRICS_PORT,
            "routers": (f"{options.internal_service}:{INTERNAL_PORT}",),
            "transports": ("tcp",),  # shared memory ends at a pod's own processes
            "cpus": (),  # the kubelet gives cores
        }
    )


def settings_file(
    settings: RouterSettings | WorkerSettings,
    *,
    left_out: Sequence[str],
    about: Sequence[str],
) -> str:
    """The YAML of every field, defaults too: another version's defaults change nothing."""
    data = settings.model_dump(mode="json", exclude={*left_out, *LOG_FILE_FIELDS})
    return _commented([*about, *INSECURE_WARNING], data)


def _commented(lines: Sequence[str], data: Mapping[str, Any]) -> str:
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.safe_dump(dict(data), sort_keys=False, width=100)


def _share(limit: int, num_routers: int) -> int:
    return max(1, math.ceil(limit / num_routers))
