"""A deployment as a folder of files for `kubectl apply -k`."""

import textwrap
from collections.abc import Iterable, Sequence

import yaml

from deploy.deployment import Deployment
from deploy.kubernetes import overlays
from deploy.kubernetes.network import network_policies, services
from deploy.kubernetes.pools import Pool, pools_of
from deploy.kubernetes.settings_files import router_settings, settings_file, worker_settings
from deploy.kubernetes.sizing import PACKAGED, model_spec, size_of
from deploy.kubernetes.values import (
    CONFIG_DIR,
    Manifest,
    PlainDumper,
    RenderOptions,
    labels,
    metadata,
)
from deploy.kubernetes.workloads import (
    config_name,
    disruption_budget,
    router_deployment,
    service_account,
    worker_set,
)
from placement.plan import format_plan

Files = dict[str, str]
"""Relative path to content."""


def render(deployment: Deployment, options: RenderOptions) -> Files:
    """All files; raises `LocalFault` for a model or a GPU type that is not known."""
    pools = pools_of(deployment.workers)
    whole = router_settings(deployment, num_routers=1)
    monitoring = overlays.monitoring_component(options)
    return {
        **_base(deployment, options, pools),
        "overlays/dev/kustomization.yaml": _text(
            [overlays.dev_overlay(options, whole, pools)],
            "One router, small CPU requests: for a cluster on a laptop.",
        ),
        "overlays/production/kustomization.yaml": _text(
            [overlays.production_overlay(options)],
            f"{options.num_routers} routers, never on one node.",
        ),
        "overlays/monitoring/kustomization.yaml": _text(
            [
                overlays.kustomization(
                    resources=["../production"], components=["../../components/monitoring"]
                )
            ],
            "Production, watched by the Prometheus Operator.",
        ),
        "components/monitoring/kustomization.yaml": _text(
            [
                overlays.kustomization(
                    "Component", namespace=options.namespace, resources=["monitoring.yaml"]
                )
            ],
            "Needs the Prometheus Operator (PodMonitor).",
        ),
        "components/monitoring/monitoring.yaml": _text(
            monitoring,
            f"Prometheus is expected in the namespace {options.prometheus_namespace}; another one "
            "is named with --prometheus-namespace.",
        ),
        "smoke/kustomization.yaml": _text(
            [overlays.kustomization(namespace=options.namespace, resources=["job.yaml"])]
        ),
        "smoke/job.yaml": _text(
            overlays.smoke_job(options), "One question to the running cluster, asked from inside."
        ),
    }


def warnings_of(deployment: Deployment, models: str) -> list[str]:
    """What a person should know before this is applied; `models` is mounted at /models, if any."""
    found = list(deployment.notes)
    pools = pools_of(deployment.workers)
    found += [
        f"pool {pool.name}: a worker's {pool.num_gpus} ranks span {pool.num_pods} nodes: the "
        "cluster needs the LeaderWorkerSet controller"
        for pool in pools
        if pool.is_multi_node
    ]
    model = deployment.router.model
    if model not in PACKAGED and not models:
        found.append(
            f"the containers look for the model at {model}: mount models (--model-claim, "
            "--models-dir) and name the folder with --model, or put it into the images"
        )
    return found


def _base(deployment: Deployment, options: RenderOptions, pools: Sequence[Pool]) -> Files:
    spec = model_spec(deployment)
    router = router_settings(deployment, num_routers=options.num_routers)
    files = {
        "namespace.yaml": _text([_namespace(options)]),
        "service-accounts.yaml": _text(_service_accounts(options, pools)),
        "services.yaml": _text(services(options, pools)),
        "network-policies.yaml": _text(
            network_policies(options, pools),
            "Default-deny, then just pdserve's own edges. Clients carry the label "
            'pdserve/client: "true".',
        ),
        "router.yaml": _text(
            [
                router_deployment(options, router),
                disruption_budget(options.router_name, labels(options, "router")),
            ]
        ),
    }
    for pool in pools:
        own = labels(options, pool.role, pool.name)
        files[f"{pool.name}.yaml"] = _text(
            [
                worker_set(options, pool, size_of(pool, spec), pools),
                disruption_budget(f"{options.name}-{pool.name}", own),
            ],
            *_placement_comments(pool),
        )
    settings = _settings_files(deployment, options, pools)
    resources = list(files)
    generators: list[Manifest] = [
        {"name": config_name(options, name), "files": [f"settings/{name}.yaml"]}
        for name in ("router", *(pool.name for pool in pools))
    ]
    files |= {f"settings/{name}": text for name, text in settings.items()}
    if deployment.plan is not None:
        files["settings/plan.yaml"] = format_plan(deployment.plan)
        generators.append(
            {
                "name": f"{options.name}-plan",
                "files": ["settings/plan.yaml"],
                "options": {"disableNameSuffixHash": True},  # for people; no pod reads it
            }
        )
    kustomization = overlays.kustomization(
        namespace=options.namespace,
        resources=resources,
        # A change of settings changes the name, and so rolls the pods.
        configMapGenerator=generators,
    )
    if any(pool.is_multi_node for pool in pools):
        files["name-references.yaml"] = _text(
            [_name_references()],
            "Where LeaderWorkerSets name the ConfigMaps that kustomize renames.",
        )
        kustomization["configurations"] = ["name-references.yaml"]
    files["kustomization.yaml"] = _text([kustomization], "kubectl apply -k ../overlays/production")
    return {f"base/{path}": text for path, text in files.items()}


def _settings_files(deployment: Deployment, options: RenderOptions, pools: Sequence[Pool]) -> Files:
    router = router_settings(deployment, num_routers=options.num_routers)
    about = [f"python -m router --settings {CONFIG_DIR}/router.yaml"]
    if options.num_routers > 1:
        about.append(
            f"max_num_requests, max_num_waiting and max_rate: a share of 1/{options.num_routers}."
        )
    files = {"router.yaml": settings_file(router, left_out=("router_id",), about=about)}
    for pool in pools:
        files[f"{pool.name}.yaml"] = settings_file(
            worker_settings(pool, options),
            left_out=("worker_id", "host", "cpus", *(("ranks",) if pool.is_multi_node else ())),
            about=(f"Each {pool.role} worker of pool {pool.name}; the pod sets what is not here.",),
        )
    return files


def _placement_comments(pool: Pool) -> list[str]:
    if not pool.nodes:
        return []
    where = ", ".join(f"{node}: {count}" for node, count in pool.nodes)
    return [
        f"The plan's nodes for this pool ({where}).",
        "Kubernetes takes no such list: the GPU type is required, the spread follows the plan's "
        "counts, and pods that share a node in the plan prefer each other. Check with kubectl get "
        "pods -o wide.",
    ]


def _namespace(options: RenderOptions) -> Manifest:
    enforce = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": metadata(options.namespace, {"app.kubernetes.io/name": "pdserve", **enforce}),
    }


def _service_accounts(options: RenderOptions, pools: Sequence[Pool]) -> list[Manifest]:
    roles = ["router", *sorted({pool.role for pool in pools})]
    return [service_account(f"{options.name}-{role}", labels(options, role)) for role in roles]


def _name_references() -> Manifest:
    fields = [
        {
            "kind": "LeaderWorkerSet",
            "path": f"spec/leaderWorkerTemplate/{template}/spec/volumes/configMap/name",
        }
        for template in ("leaderTemplate", "workerTemplate")
    ]
    return {"nameReference": [{"kind": "ConfigMap", "version": "v1", "fieldSpecs": fields}]}


def _text(documents: Iterable[Manifest], *comments: str) -> str:
    head = "".join(f"# {line}\n" for text in comments for line in textwrap.wrap(text, 96))
    body = yaml.dump_all(documents, Dumper=PlainDumper, sort_keys=False, width=100)
    return head + body
