"""What `pdserve up` was given, as a deployment: a cluster file, a plan file, or neither."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.deployment import Deployment, deployment_of_cluster
from deploy.plan_deployment import PlanOptions, deployment_of_plan
from pdserve.config.base import parse_assignment, read_yaml
from pdserve.config.cluster import parse_cluster_settings
from pdserve.domain.errors import LocalFault
from placement.plan import parse_plan

MIN_CPUS_TO_PIN = 2


def read_deployment(
    path: Path | None,
    flags: Mapping[str, object],
    assignments: Sequence[str],
    *,
    scale: float | None = None,
    gpus_file: Path | None = None,
    pin: bool | None = None,
) -> Deployment:
    """The file's cluster with `assignments` (name=value) and then the given flags laid over it.

    `pin` puts prefill and decode on cores of their own; left out, plans do it where there are
    cores enough, since their predictions have it. Raises `LocalFault` naming source and field.
    """
    given = dict(map(parse_assignment, assignments))
    given |= {name: value for name, value in flags.items() if value is not None}
    data = read_yaml(path) if path is not None else {}
    source = str(path) if path is not None else "settings"
    is_plan = is_plan_file(data)
    if is_plan:
        options = PlanOptions(
            settings=given, scale=1.0 if scale is None else scale, gpus_file=gpus_file
        )
        deployment = deployment_of_plan(parse_plan(data, source=source), options, source=source)
    elif scale is not None or gpus_file is not None:
        raise LocalFault("--scale and --gpus-file are for plan files; see `pdserve plan`")
    else:
        deployment = deployment_of_cluster(parse_cluster_settings(data, given, source=source))
    wants_pinning = is_plan if pin is None else pin
    return pinned(deployment) if wants_pinning else deployment


def pinned(deployment: Deployment) -> Deployment:
    """Prefill and decode on cores of their own, where this process has cores enough."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return deployment.pinned_to(cpus) if len(cpus) >= MIN_CPUS_TO_PIN else deployment


def is_plan_file(data: object) -> bool:
    """Whether a YAML file's content is a plan, of whatever version, and no cluster file."""
    return isinstance(data, Mapping) and ("pools" in data or "version" in data)
