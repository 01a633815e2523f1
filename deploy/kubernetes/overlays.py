"""What is laid over the base: a small cluster, production, monitoring, the smoke test."""

import json
from collections.abc import Sequence

from deploy.kubernetes.network import client_policy, metrics_policy
from deploy.kubernetes.pods import SCRATCH_ENV, container_security, env_entries, pod_security
from deploy.kubernetes.pools import Pool
from deploy.kubernetes.values import (
    CLIENT_LABEL,
    ROUTER_PORT,
    Manifest,
    RenderOptions,
    cluster_labels,
    metadata,
)
from deploy.kubernetes.workloads import HOSTNAME
from pdserve.config.processes import RouterSettings

SMOKE_S = 300


def kustomization(kind: str = "Kustomization", **fields: object) -> Manifest:
    version = "v1alpha1" if kind == "Component" else "v1beta1"
    return {"apiVersion": f"kustomize.config.k8s.io/{version}", "kind": kind, **fields}


def dev_overlay(options: RenderOptions, router: RouterSettings, pools: Sequence[Pool]) -> Manifest:
    """One router with all of the plan's limits, and small CPU requests: fits a laptop's cluster.

    `router` has the limits of the whole cluster.
    """
    args = "/spec/template/spec/containers/0/args/-"
    router_patch: list[Manifest] = [{"op": "replace", "path": "/spec/replicas", "value": 1}]
    limits: dict[str, float] = {"max_num_requests": router.max_num_requests}
    if router.max_num_waiting:
        limits["max_num_waiting"] = router.max_num_waiting
    if router.max_rate:
        limits["max_rate"] = router.max_rate
    for name, limit in limits.items():
        for argument in ("--set", f"{name}={limit}"):
            router_patch.append({"op": "add", "path": args, "value": argument})
    small = [
        {
            "op": "replace",
            "path": "/spec/template/spec/containers/0/resources/requests/cpu",
            "value": "100m",
        }
    ]
    patches = [_patch("Deployment", options.router_name, router_patch + small)]
    patches += [
        _patch("StatefulSet", f"{options.name}-{pool.name}", small)
        for pool in pools
        if not pool.num_gpus
    ]
    return kustomization(resources=["../../base"], patches=patches)


def production_overlay(options: RenderOptions) -> Manifest:
    """Routers on nodes of their own each, come what may."""
    path = "/spec/template/spec/topologySpreadConstraints/0"
    patch: list[Manifest] = [
        {"op": "test", "path": f"{path}/topologyKey", "value": HOSTNAME},
        {"op": "replace", "path": f"{path}/whenUnsatisfiable", "value": "DoNotSchedule"},
    ]
    return kustomization(
        resources=["../../base"], patches=[_patch("Deployment", options.router_name, patch)]
    )


def monitoring_component(options: RenderOptions) -> list[Manifest]:
    """A PodMonitor for every process, and the hole in default-deny that it needs."""
    selector = cluster_labels(options)
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(options.name, selector),
        "spec": {
            "selector": {"matchLabels": selector},
            "podTargetLabels": ["app.kubernetes.io/component", "pdserve/pool"],
            "podMetricsEndpoints": [
                {"port": "metrics", "path": "/metrics", "interval": "15s", "scrapeTimeout": "10s"}
            ],
        },
    }
    return [monitor, metrics_policy(options)]


def smoke_job(options: RenderOptions) -> list[Manifest]:
    """`pdserve smoke` from inside the cluster, as a client that the policies let in."""
    name = f"{options.name}-smoke"
    own = {**CLIENT_LABEL, "app.kubernetes.io/name": "pdserve-smoke"}
    limits = {"cpu": 1, "memory": "512Mi", "ephemeral-storage": "256Mi"}
    address = f"{options.name}:{ROUTER_PORT}"
    container: Manifest = {
        "name": "smoke",
        "image": options.image_router,
        "imagePullPolicy": "IfNotPresent",
        "command": ["pdserve"],
        "args": ["smoke", "--address", address],
        "env": env_entries(SCRATCH_ENV),
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    job: Manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(name, own),
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": SMOKE_S,
            "ttlSecondsAfterFinished": 3600,
            "template": {
                "metadata": {"labels": own},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "securityContext": pod_security(),
                    "containers": [container],
                    "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}],
                },
            },
        },
    }
    return [job, client_policy(options, name)]


def _patch(kind: str, name: str, operations: Sequence[Manifest]) -> Manifest:
    """A JSON patch, as the YAML that kustomize reads from a string."""
    return {
        "target": {"kind": kind, "name": name},
        "patch": json.dumps(list(operations), indent=1),
    }
