"""What all manifests share: names, labels, ports, and what the person may choose."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pdserve import __version__
from pdserve.domain.errors import LocalFault

Manifest = dict[str, Any]
"""One Kubernetes object as it is written to YAML."""

ROUTER_IMAGE = f"pdserve-router:{__version__}"
WORKER_IMAGE = f"pdserve-worker:{__version__}"
CONFIG_DIR = "/etc/pdserve"
MODELS_DIR = "/models"
ROUTER_PORT = 7450
INTERNAL_PORT = 7451
WORKER_PORT = 7460
KV_PORT = 7461
"""Of the first rank of a pod; the others count up."""
RANKS_PORT = 29500
"""Where the pods of a worker that spans nodes meet."""
METRICS_PORT = 7452
CLIENT_LABEL = {"pdserve/client": "true"}
"""Pods with this label, in any namespace, may talk to the router's public port."""

_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_IMAGE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._/:-]*?)(:(?P<tag>[\w][\w.-]*)|@sha256:[0-9a-f]{64})"
)
FLOATING_TAGS = {"latest", "main", "master", "stable", "edge", "nightly", "dev"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOptions:
    """Choices that are not the plan's; raises `LocalFault` for one that cannot work."""

    name: str = "pdserve"
    namespace: str = "pdserve"
    image_router: str = ROUTER_IMAGE
    image_worker: str = WORKER_IMAGE
    num_routers: int = 2
    model_claim: str = ""  # PersistentVolumeClaim with the model, mounted at /models
    prometheus_namespace: str = "monitoring"
    gpu_labels: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # type: label, value

    def __post_init__(self) -> None:
        for what, value in (("--name", self.name), ("--namespace", self.namespace)):
            if not _DNS_LABEL.fullmatch(value):
                raise LocalFault(
                    f"{what} {value}: use lower case letters, digits and dashes, 40 at most, "
                    "a letter first"
                )
        check_image(self.image_router, "--image-router")
        check_image(self.image_worker, "--image-worker")
        if self.num_routers < 1:
            raise LocalFault(f"--routers must be at least 1, got {self.num_routers}")

    @property
    def router_name(self) -> str:
        return f"{self.name}-router"

    @property
    def internal_service(self) -> str:
        """Headless: each of its addresses is a router that workers register with."""
        return f"{self.name}-router-internal"


def check_image(image: str, flag: str) -> None:
    """Raise `LocalFault` for an image that another push could change under a running cluster."""
    match = _IMAGE.fullmatch(image)
    if match is None:
        raise LocalFault(
            f"{flag} {image}: give NAME:TAG with an exact version, or NAME@sha256:DIGEST"
        )
    if match["tag"] in FLOATING_TAGS:
        raise LocalFault(
            f"{flag} {image}: the tag {match['tag']} moves; give an exact version or a digest"
        )


def cluster_labels(options: RenderOptions) -> dict[str, str]:
    """Of every object of the cluster."""
    return {"app.kubernetes.io/name": "pdserve", "app.kubernetes.io/instance": options.name}


def labels(options: RenderOptions, component: str, pool: str = "") -> dict[str, str]:
    """Of an object of `component` (router, prefill, decode); a worker's pool has one more."""
    # YAML knows no enumerations.
    found = cluster_labels(options) | {"app.kubernetes.io/component": str(component)}
    return {**found, "pdserve/pool": pool} if pool else found


def metadata(
    name: str, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None
) -> Manifest:
    found: Manifest = {"name": name, "labels": dict(labels)}
    if annotations:
        found["annotations"] = dict(annotations)
    return found


class PlainDumper(yaml.SafeDumper):
    """No anchors: the same value twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True
