"""Routers as a Deployment, workers as StatefulSets or, where ranks span nodes, LeaderWorkerSets."""

from collections.abc import Mapping, Sequence

from deploy.kubernetes.accelerators import Accelerator, accelerator
from deploy.kubernetes.network import kv_ports_of
from deploy.kubernetes.pods import (
    ENDPOINTS_S,
    Container,
    env_entries,
    field_entry,
    pod_spec,
    port_entries,
)
from deploy.kubernetes.pools import Pool
from deploy.kubernetes.settings_files import POD_SETS_ROUTER, pod_assignments
from deploy.kubernetes.sizing import PodSize
from deploy.kubernetes.values import (
    INTERNAL_PORT,
    METRICS_PORT,
    RANKS_PORT,
    ROUTER_PORT,
    WORKER_PORT,
    Manifest,
    RenderOptions,
    labels,
    metadata,
)
from deploy.processes import MODULES
from pdserve.config.processes import RouterSettings

HOSTNAME = "kubernetes.io/hostname"
ZONE = "topology.kubernetes.io/zone"
SPREAD_WEIGHT = 50
ROUTER_START_S = 120.0
# Two texts of 2 MB that are tokenised hold 800 MB.
ROUTER_RESOURCES: Manifest = {
    "requests": {"cpu": 1, "memory": "2Gi", "ephemeral-storage": "256Mi"},
    "limits": {"cpu": 2, "memory": "2Gi", "ephemeral-storage": "1Gi"},
}
ROUTER_SCRATCH_BYTES = 64 * 2**20
LWS_LABELS = {
    "PDSERVE_GROUP": "leaderworkerset.sigs.k8s.io/group-index",
    "PDSERVE_NODE_RANK": "leaderworkerset.sigs.k8s.io/worker-index",
}


def router_deployment(options: RenderOptions, router: RouterSettings) -> Manifest:
    own = labels(options, "router")
    container = Container(
        name="router",
        image=options.image_router,
        module="router",
        settings_file="router.yaml",
        assignments=POD_SETS_ROUTER,
        ports={"public": ROUTER_PORT, "internal": INTERNAL_PORT, "metrics": METRICS_PORT},
        probe_port=ROUTER_PORT,
        resources=ROUTER_RESOURCES,
        start_s=ROUTER_START_S,
    )
    spec = pod_spec(
        container,
        service_account=options.router_name,
        timers=router.timers,
        lag_s=ENDPOINTS_S,
        scratch_bytes=ROUTER_SCRATCH_BYTES,
        model_claim=options.model_claim,
        config_map=config_name(options, "router"),
    )
    spec["topologySpreadConstraints"] = [
        _spread(own, key, 1, "ScheduleAnyway") for key in (HOSTNAME, ZONE)
    ]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(options.router_name, own),
        "spec": {
            "replicas": options.num_routers,
            "minReadySeconds": 5,  # workers look for routers every second
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
            },
            "selector": {"matchLabels": own},
            "template": {"metadata": {"labels": own}, "spec": spec},
        },
    }


def worker_set(
    options: RenderOptions, pool: Pool, size: PodSize, pools: Sequence[Pool]
) -> Manifest:
    """The pool's StatefulSet, or LeaderWorkerSet where one worker needs more than a node."""
    own = labels(options, pool.role, pool.name)
    spec = _worker_spec(options, pool, size, pools)
    template: Manifest = {"metadata": {"labels": own}, "spec": spec}
    about = metadata(f"{options.name}-{pool.name}", own, _plan_annotations(pool))
    if pool.is_multi_node:
        return _leader_worker_set(about, pool, template)
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": about,
        "spec": {
            "serviceName": f"{options.name}-{pool.name}",
            "replicas": pool.replicas,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "RollingUpdate"},
            "selector": {"matchLabels": own},
            "template": template,
        },
    }


def disruption_budget(name: str, own: dict[str, str]) -> Manifest:
    """One pod at a time; one that is not ready may always go."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(name, own),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": own},
        },
    }


def service_account(name: str, own: dict[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(name, own),
        "automountServiceAccountToken": False,
    }


def config_name(options: RenderOptions, pool: str) -> str:
    """Of the ConfigMap with one kind of pod's settings, before kustomize adds its hash."""
    return f"{options.name}-{pool}-settings"


def _worker_spec(
    options: RenderOptions, pool: Pool, size: PodSize, pools: Sequence[Pool]
) -> Manifest:
    gpu = accelerator(pool.gpu, options.gpu_labels) if pool.num_gpus else None
    ranks = {"ranks": RANKS_PORT} if pool.is_multi_node else {}
    container = Container(
        name=str(pool.role),
        image=options.image_worker,
        module=MODULES[pool.role],
        settings_file=f"{pool.name}.yaml",
        assignments=pod_assignments(pool, options),
        ports={"grpc": WORKER_PORT, **kv_ports_of(pool), **ranks, "metrics": METRICS_PORT},
        probe_port=WORKER_PORT,
        resources=size.resources(pool.gpus_per_pod, gpu),
        start_s=size.start_s,
        env=[*env_entries(pool.thread_env), *(_group_env() if pool.is_multi_node else [])],
    )
    spec = pod_spec(
        container,
        service_account=f"{options.name}-{pool.role}",
        timers=pool.settings.timers,
        shm_bytes=size.shm_bytes,
        scratch_bytes=size.scratch_bytes,
        model_claim=options.model_claim,
        config_map=config_name(options, pool.name),
    )
    if affinity := _affinity(options, pool, pools, gpu):
        spec["affinity"] = affinity
    if gpu is not None:
        spec["tolerations"] = [
            {"key": gpu.resource, "operator": "Exists", "effect": "NoSchedule"},
        ]
    if not pool.is_multi_node:
        own = labels(options, pool.role, pool.name)
        spec["topologySpreadConstraints"] = [
            _spread(own, HOSTNAME, _planned_skew(pool), "ScheduleAnyway")
        ]
    return spec


def _leader_worker_set(about: Manifest, pool: Pool, template: Manifest) -> Manifest:
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": about,
        "spec": {
            "replicas": pool.replicas,
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0},
            },
            "leaderWorkerTemplate": {
                "size": pool.num_pods,
                # The ranks of a worker are one process to the others: they live and end together.
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": template,
                "workerTemplate": _follower(template, kv_ports_of(pool)),
            },
        },
    }


def _follower(template: Manifest, kv_ports: Mapping[str, int]) -> Manifest:
    """As the leader, but it serves no requests: its ranks only compute, and let KV be read.

    It has no probes: the leader hears its ranks every moment, and ends with the whole group where
    one is lost or silent.
    """
    served = {"startupProbe", "livenessProbe", "readinessProbe", "ports"}
    (container,) = template["spec"]["containers"]
    quiet = {name: value for name, value in container.items() if name not in served}
    if kv_ports:
        quiet["ports"] = port_entries(kv_ports)
    return {**template, "spec": {**template["spec"], "containers": [quiet]}}


def _group_env() -> list[Manifest]:
    """Beside LWS_LEADER_ADDRESS, which the LeaderWorkerSet's controller sets itself."""
    return [field_entry(name, f"metadata.labels['{label}']") for name, label in LWS_LABELS.items()]


def _affinity(
    options: RenderOptions, pool: Pool, pools: Sequence[Pool], gpu: Accelerator | None
) -> Manifest:
    """Only nodes of the GPU type; near the pools that the plan puts on the same nodes."""
    found: Manifest = {}
    if gpu is not None and gpu.label:
        wanted = {"key": gpu.label, "operator": "In", "values": list(gpu.values)}
        found["nodeAffinity"] = {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [wanted]}]
            }
        }
    nodes = {name for name, _ in pool.nodes}
    neighbours = [
        other for other in pools if other is not pool and nodes & {name for name, _ in other.nodes}
    ]
    if neighbours:
        found["podAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": SPREAD_WEIGHT,
                    "podAffinityTerm": {
                        "topologyKey": HOSTNAME,
                        "labelSelector": {"matchLabels": labels(options, other.role, other.name)},
                    },
                }
                for other in neighbours
            ]
        }
    return found


def _planned_skew(pool: Pool) -> int:
    """As uneven as the plan is: packing by its node counts is no violation."""
    counts = [count for _, count in pool.nodes]
    return max(1, max(counts) - min(counts)) if counts else 1


def _plan_annotations(pool: Pool) -> dict[str, str]:
    """What Kubernetes cannot pin, for people: which of the plan's nodes held how many."""
    if not pool.nodes:
        return {}
    return {"pdserve/planned-nodes": ", ".join(f"{node} x{count}" for node, count in pool.nodes)}


def _spread(own: dict[str, str], key: str, max_skew: int, when: str) -> Manifest:
    return {
        "maxSkew": max_skew,
        "topologyKey": key,
        "whenUnsatisfiable": when,
        "labelSelector": {"matchLabels": own},
    }
