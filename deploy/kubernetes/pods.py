"""Pod templates: one container of ours, locked down, with probes and a graceful end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.kubernetes.values import CONFIG_DIR, MODELS_DIR, Manifest
from pdserve.config.timers import Timers
from pdserve.rpc.health import LIVENESS

USER_ID = 10001
PROBE_PERIOD_S = 5
ENDPOINTS_S = 5
"""New requests may still come for this long after a pod is told to end: kube-proxies lag."""
KILL_MARGIN_S = 10
SCRATCH_ENV = {
    "HOME": "/tmp",
    "NUMBA_CACHE_DIR": "/tmp/numba",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
}
"""The root is read-only: what libraries write goes to /tmp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """What differs between our containers."""

    name: str
    image: str
    module: str
    settings_file: str
    assignments: Sequence[str]  # NAME=VALUE; $(POD_NAME) and $(POD_IP) are the pod's
    ports: Mapping[str, int]
    probe_port: int
    resources: Manifest
    start_s: float
    env: Sequence[Manifest] = ()


def pod_spec(
    container: Container,
    *,
    service_account: str,
    timers: Timers,
    lag_s: int = 0,
    shm_bytes: int = 0,
    scratch_bytes: int,
    model_claim: str = "",
    config_map: str,
) -> Manifest:
    """The pod's spec. It lives on for `lag_s` before SIGTERM, then for its drain."""
    volumes: list[Manifest] = [
        {"name": "settings", "configMap": {"name": config_map}},
        {"name": "tmp", "emptyDir": {"sizeLimit": _mebi(scratch_bytes)}},
    ]
    mounts: list[Manifest] = [
        {"name": "settings", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if shm_bytes:
        volumes.append(
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _mebi(shm_bytes)}}
        )
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if model_claim:
        claim = {"claimName": model_claim, "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
        mounts.append({"name": "models", "mountPath": MODELS_DIR, "readOnly": True})
    return {
        "serviceAccountName": service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(timers.drain_s) + lag_s + KILL_MARGIN_S,
        "securityContext": pod_security(),
        "containers": [_container(container, mounts, lag_s)],
        "volumes": volumes,
    }


def pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def env_entries(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]


def field_entry(name: str, path: str) -> Manifest:
    """An environment variable that has what Kubernetes knows of the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def port_entries(ports: Mapping[str, int]) -> list[Manifest]:
    return [
        {"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()
    ]


def _container(container: Container, mounts: Sequence[Manifest], lag_s: int) -> Manifest:
    args = ["--settings", f"{CONFIG_DIR}/{container.settings_file}"]
    for assignment in container.assignments:
        args += ["--set", assignment]
    found: Manifest = {
        "name": container.name,
        "image": container.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", container.module],
        "args": args,
        "env": [
            field_entry("POD_NAME", "metadata.name"),
            field_entry("POD_IP", "status.podIP"),
            *env_entries(SCRATCH_ENV),
            *container.env,
        ],
        "ports": port_entries(container.ports),
        **_probes(container),
        "resources": container.resources,
        "securityContext": container_security(),
        "volumeMounts": list(mounts),
    }
    if lag_s:
        # Ready until the pod is out of the Service: what still arrives in between is answered.
        sleep = ["python", "-c", f"import time; time.sleep({lag_s})"]
        found["lifecycle"] = {"preStop": {"exec": {"command": sleep}}}
    return found


def _probes(container: Container) -> Manifest:
    """Stuck is not busy.

    Liveness fails where the event loop does not answer, or the engine is in one step for longer
    than `timers.stuck_s`; steps that follow one another, however long the queue, are none of its
    business. Readiness is off while the process drains or nobody would send it work.
    """
    port = container.probe_port
    return {
        "startupProbe": {
            "grpc": {"port": port, "service": LIVENESS},
            "periodSeconds": PROBE_PERIOD_S,
            "timeoutSeconds": 2,
            "failureThreshold": math.ceil(container.start_s / PROBE_PERIOD_S),
        },
        "livenessProbe": {
            "grpc": {"port": port, "service": LIVENESS},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        "readinessProbe": {
            "grpc": {"port": port},
            "periodSeconds": PROBE_PERIOD_S,
            "timeoutSeconds": 2,
            "failureThreshold": 2,
        },
    }


def _mebi(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / 2**20)}Mi"
