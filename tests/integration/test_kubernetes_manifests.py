"""What `pdserve render kubernetes` writes: valid, as recorded, with the plan's limits, locked down.

The golden files are brought up to date by PDSERVE_UPDATE_GOLDEN=1 pytest <this file>; look at the
difference before you commit it.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pdserve.config.base import lay_over, parse_assignment, parse_settings
from pdserve.config.processes import RouterSettings, WorkerSettings
from tests.support.kubernetes_manifests import (
    BUILDS,
    GOLDEN,
    KUBERNETES_VERSIONS,
    PLANS,
    Object,
    build,
    built,
    find,
    needs_kubectl,
    pod_templates,
    read_schemas_once,
    render,
    rendered,
    validate,
)
from tests.support.network_policies import Endpoint, allows

pytestmark = needs_kubectl
__all__ = ["read_schemas_once"]

GOLDEN_BUILDS = [
    *(("cpu", overlay) for overlay in BUILDS),
    ("h200", "overlays/production"),
    ("spanning", "overlays/monitoring"),
]
RANKS_OF_PREFILL = {"cpu": 1, "h200": 2, "spanning": 8}
UPDATE = "PDSERVE_UPDATE_GOLDEN"


def everything() -> dict[str, Object]:
    """Each distinct object of all plans and overlays."""
    objects = [each for plan in PLANS for overlay in BUILDS for each in built(plan, overlay)]
    return {json.dumps(each, sort_keys=True): each for each in objects}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.usefixtures("read_schemas_once")
def test_every_object_is_valid_for_kubernetes(version: str) -> None:
    for found in everything().values():
        validate(found, version)


@pytest.mark.usefixtures("read_schemas_once")
@pytest.mark.parametrize(
    ("plan", "kind", "path"),
    [
        ("cpu", "Deployment", "spec/template/spec/containers/0/livenessProbe/grpc/servise"),
        ("cpu", "NetworkPolicy", "spec/ingres"),
        ("cpu", "PodMonitor", "spec/podMetricsEndpoints/0/prot"),
        ("spanning", "LeaderWorkerSet", "spec/leaderWorkerTemplate/sise"),
        ("spanning", "LeaderWorkerSet", "spec/leaderWorkerTemplate/workerTemplate/spec/node"),
    ],
)
def test_a_misspelt_field_is_found(plan: str, kind: str, path: str) -> None:
    found = next(e for e in built(plan, "overlays/monitoring") if e["kind"] == kind)
    changed: Any = json.loads(json.dumps(found))
    *way, last = path.split("/")
    inner = changed
    for part in way:
        inner = inner[int(part) if part.isdigit() else part]
    inner[last] = "x"
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        validate(changed, "1.32")


def test_an_unknown_kind_is_not_passed_over() -> None:
    unknown = {"apiVersion": "apps/v1", "kind": "StatefullSet", "metadata": {"name": "x"}}
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        validate(unknown, "1.32")


@pytest.mark.parametrize(("plan", "overlay"), GOLDEN_BUILDS)
def test_overlay_is_as_recorded(plan: str, overlay: str) -> None:
    path = GOLDEN / plan / f"{Path(overlay).name}.yaml"
    objects = list(built(plan, overlay))
    if os.environ.get(UPDATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump_all(objects, sort_keys=False, width=100))
    assert objects == list(yaml.safe_load_all(path.read_text())), f"{UPDATE}=1 records it anew"


def test_every_object_has_its_namespace() -> None:
    for found in everything().values():
        if found["kind"] != "Namespace":
            assert found["metadata"]["namespace"] == "pdserve", found["metadata"]


# The plan's limits


def config_files(objects: tuple[Object, ...] | list[Object]) -> dict[str, dict[str, str]]:
    return {
        each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "ConfigMap"
    }


IN_POD = {
    "POD_NAME": "pod-0",
    "POD_IP": "10.1.2.3",
    "PDSERVE_GROUP": "1",
    "LWS_LEADER_ADDRESS": "pdserve-decode-1.pdserve-decode.pdserve",
}


def started_with(objects: tuple[Object, ...] | list[Object], owner: Object, node: int = 0) -> Any:
    """The settings that a pod's own command line makes of its own ConfigMap.

    `node` is the pod's place in a group of pods that are one worker.
    """
    template = list(pod_templates(owner))[min(node, 1)]
    (container,) = template["spec"]["containers"]
    args = container["args"]
    settings_path = args[args.index("--settings") + 1]
    volume = next(v for v in template["spec"]["volumes"] if "configMap" in v)
    text = config_files(objects)[volume["configMap"]["name"]][Path(settings_path).name]
    sets = [args[i + 1] for i, argument in enumerate(args) if argument == "--set"]
    values = {**IN_POD, "PDSERVE_NODE_RANK": str(node)}
    filled = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text) for text in sets]
    kind = RouterSettings if container["command"][-1] == "router" else WorkerSettings
    data = lay_over(yaml.safe_load(text), map(parse_assignment, filled))
    return parse_settings(kind, data, source=settings_path)


@pytest.mark.parametrize("overlay", ["base", "overlays/dev", "overlays/monitoring"])
@pytest.mark.parametrize("plan", PLANS)
def test_processes_start_with_the_plans_limits(plan: str, overlay: str) -> None:
    objects = built(plan, overlay)
    planned = yaml.safe_load((GOLDEN / "plans" / f"{plan}.yaml").read_text())
    limits = planned["limits"]
    deployment = find(objects, "Deployment", "pdserve-router")
    router = started_with(objects, deployment)
    replicas = deployment["spec"]["replicas"]
    assert replicas == (1 if overlay == "overlays/dev" else 2)
    assert router.max_num_waiting * replicas == limits["max_num_waiting"]
    assert router.max_wait_s == limits["max_wait_s"]
    assert router.max_rate is not None
    assert router.max_rate * replicas == pytest.approx(limits["max_rate"])
    assert [each.name for each in router.slo] == [each["name"] for each in planned["slo"]]
    owners = [each for each in objects if each["kind"] in ("StatefulSet", "LeaderWorkerSet")]
    assert sum(owner["spec"]["replicas"] for owner in owners) == sum(
        pool["replicas"] for pool in planned["pools"]
    )
    by_cut = {(p["role"], p["tp"], p.get("pp", 1)): p for p in planned["pools"]}
    for owner in owners:
        worker = started_with(objects, owner)
        pool = by_cut[worker.role, worker.engine.tp, worker.engine.pp]
        assert owner["spec"]["replicas"] == pool["replicas"]
        assert worker.max_step_tokens == limits["max_step_tokens"]
        assert worker.max_num_requests == limits["max_num_requests"]
        assert worker.max_num_queued >= limits["max_num_waiting"]
        assert worker.engine.num_blocks * worker.engine.block_size == pool["kv_tokens"]
        assert worker.routers == ("pdserve-router-internal:7451",)
        name = "pod-0" if owner["kind"] == "StatefulSet" else "pdserve-decode-1"
        assert (worker.transports, worker.host, worker.worker_id) == (("tcp",), "10.1.2.3", name)


def test_a_change_of_settings_rolls_the_pods(tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    render(GOLDEN / "plans" / "spanning.yaml", changed, "--set", "timers.drain_s=45")
    before, after = built("spanning", "base"), build(changed / "base")
    for kind, name in (
        ("StatefulSet", "pdserve-prefill-mi300x-tp4"),
        ("LeaderWorkerSet", "pdserve-decode"),
    ):
        names = []
        for objects in (before, after):
            for template in pod_templates(find(objects, kind, name)):
                (volume,) = [v for v in template["spec"]["volumes"] if "configMap" in v]
                names.append(volume["configMap"]["name"])
                assert volume["configMap"]["name"] in config_files(objects)
        assert len(set(names)) == 2


# Places


def test_gpus_are_asked_for_by_vendor_and_type() -> None:
    objects = built("spanning", "base")
    expected = {
        ("StatefulSet", "pdserve-prefill-mi300x-tp4"): ("amd.com/gpu", 4, "74a1"),
        ("StatefulSet", "pdserve-prefill-h100-sxm-tp8"): (
            "nvidia.com/gpu",
            8,
            "NVIDIA-H100-80GB-HBM3",
        ),
        ("LeaderWorkerSet", "pdserve-decode"): ("nvidia.com/gpu", 8, "NVIDIA-H100-80GB-HBM3"),
    }
    for (kind, name), (resource, count, value) in expected.items():
        for template in pod_templates(find(objects, kind, name)):
            (container,) = template["spec"]["containers"]
            assert container["resources"]["limits"][resource] == count
            assert container["resources"]["requests"][resource] == count
            terms = template["spec"]["affinity"]["nodeAffinity"]
            (term,) = terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
            assert term["matchExpressions"][0]["values"] == [value]


def test_only_a_worker_that_spans_nodes_needs_a_custom_resource() -> None:
    assert not [e for e in built("h200", "base") if e["kind"] == "LeaderWorkerSet"]
    group = find(built("spanning", "base"), "LeaderWorkerSet", "pdserve-decode")
    assert group["spec"]["leaderWorkerTemplate"]["size"] == 2
    assert group["spec"]["replicas"] == 2


def test_pods_of_a_worker_that_spans_nodes_are_parts_of_one_worker() -> None:
    objects = built("spanning", "base")
    group = find(objects, "LeaderWorkerSet", "pdserve-decode")
    parts = [started_with(objects, group, node) for node in range(2)]
    assert [part.ranks.node for part in parts] == [0, 1]
    assert {part.ranks.per_node for part in parts} == {8}
    assert {part.ranks.leader for part in parts} == {f"{IN_POD['LWS_LEADER_ADDRESS']}:29500"}
    assert {part.worker_id for part in parts} == {"pdserve-decode-1"}
    alike = {part.model_copy(update={"ranks": None}).model_dump_json() for part in parts}
    assert len(alike) == 1
    whole = started_with(objects, find(objects, "StatefulSet", "pdserve-prefill-h100-sxm-tp8"))
    assert (whole.num_local_ranks, whole.ranks.leader) == (8, None)
    leader, follower = (
        template["spec"]["containers"][0]
        for template in pod_templates(find(objects, "LeaderWorkerSet", "pdserve-decode"))
    )
    assert {"name": "ranks", "containerPort": 29500, "protocol": "TCP"} in leader["ports"]
    assert not {"ports", "startupProbe", "livenessProbe", "readinessProbe"} & set(follower)
    patience = leader["startupProbe"]["failureThreshold"] * leader["startupProbe"]["periodSeconds"]
    assert patience > 600, "pods of a group may come late"


def test_pools_that_share_nodes_in_the_plan_prefer_each_other() -> None:
    decode = find(built("h200", "base"), "StatefulSet", "pdserve-decode")
    affinity = decode["spec"]["template"]["spec"]["affinity"]["podAffinity"]
    (term,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    labels = term["podAffinityTerm"]["labelSelector"]["matchLabels"]
    assert labels["pdserve/pool"] == "prefill"
    assert "h200_sxm:5 x1" in decode["metadata"]["annotations"]["pdserve/planned-nodes"]


# Security


def all_templates() -> Iterator[tuple[str, Object]]:
    for found in everything().values():
        for template in pod_templates(found):
            yield f"{found['kind']} {found['metadata']['name']}", template


def test_pods_are_locked_down() -> None:
    templates = list(all_templates())
    assert len(templates) > 10
    for where, template in templates:
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["enableServiceLinks"] is False, where
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] > 0, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        assert not [v for v in spec["volumes"] if "hostPath" in v], where
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, where
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert "privileged" not in context, where
            for amounts in (container["resources"]["limits"], container["resources"]["requests"]):
                assert {"cpu", "memory", "ephemeral-storage"} <= set(amounts), where
            image, _, tag = container["image"].rpartition(":")
            assert image, where
            assert tag[0].isdigit(), where
            for volume in spec["volumes"]:
                if "emptyDir" in volume:
                    assert volume["emptyDir"]["sizeLimit"], where


def endpoints(objects: tuple[Object, ...]) -> list[Endpoint]:
    """Two pods of each template, and strangers."""
    found = []
    for owner in objects:
        for template in pod_templates(owner):
            (container,) = template["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for index in range(2):
                found.append(
                    Endpoint(
                        name=f"{owner['metadata']['name']}-{index}",
                        ip="",
                        namespace=owner["metadata"]["namespace"],
                        labels=template["metadata"]["labels"],
                        ports=ports,
                    )
                )
    for name, namespace, labels in (
        ("stranger", "pdserve", {}),
        ("other-stranger", "default", {}),
        ("client", "default", {"pdserve/client": "true"}),
        ("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
        ("false-prometheus", "default", {"app.kubernetes.io/name": "prometheus"}),
        ("kube-dns", "kube-system", {"k8s-app": "kube-dns"}),
    ):
        found.append(Endpoint(name=name, ip="", namespace=namespace, labels=labels))
    return found


@pytest.mark.parametrize("overlay", ["base", "overlays/dev", "overlays/monitoring"])
@pytest.mark.parametrize("plan", PLANS)
def test_policies_leave_the_needed_edges_and_no_others(plan: str, overlay: str) -> None:
    objects = built(plan, overlay)
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    ends = endpoints(objects)
    ports = {port for end in ends for port in end.ports.values()} | {22, 53, 443, 29500}
    edges = {
        (_component(source), _component(target), port)
        for source in ends
        for target in ends
        for port in ports
        if "pdserve" in (source.namespace, target.namespace)
        and source is not target
        and allows(policies, source, target, "TCP", port)
    }
    expected = {
        ("client", "router", 7450),
        ("router", "decode", 7460),
        ("decode", "prefill", 7460),
        *(("decode", "prefill", 7461 + rank) for rank in range(RANKS_OF_PREFILL[plan])),
        ("prefill", "router", 7451),
        ("decode", "router", 7451),
        ("prefill", "kube-dns", 53),
        ("decode", "kube-dns", 53),
    }
    if overlay == "overlays/monitoring":
        expected |= {("prometheus", role, 7452) for role in ("router", "prefill", "decode")}
    if plan == "spanning":  # the ranks of one worker are open to each other
        expected |= {("decode", "decode", port) for port in ports}
    assert edges == expected


def _component(endpoint: Endpoint) -> str:
    return endpoint.labels.get("app.kubernetes.io/component", endpoint.name)


def test_the_namespace_enforces_the_restricted_profile() -> None:
    namespace = find(built("cpu", "base"), "Namespace", "pdserve")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_service_accounts_get_no_token() -> None:
    accounts = [each for each in built("cpu", "base") if each["kind"] == "ServiceAccount"]
    assert len(accounts) == 3
    assert all(each["automountServiceAccountToken"] is False for each in accounts)


def test_insecure_binding_is_visible_in_every_settings_file() -> None:
    for name, files in config_files(built("cpu", "base")).items():
        if name == "pdserve-plan":
            continue
        (text,) = files.values()
        assert "insecure: true\n" in text
        assert "# insecure: true lets the process listen" in text


def test_a_pod_outlives_its_drain() -> None:
    for _, template in all_templates():
        (container,) = template["spec"]["containers"]
        if "--settings" not in container.get("args", ()):
            continue
        lag_s = 5 if "lifecycle" in container else 0
        assert template["spec"]["terminationGracePeriodSeconds"] >= 30 + lag_s + 5


def test_liveness_waits_for_the_start() -> None:
    for _, template in all_templates():
        (container,) = template["spec"]["containers"]
        if "livenessProbe" in container:
            assert container["livenessProbe"]["grpc"]["service"] == "pdserve.live"
            assert container["startupProbe"]["grpc"]["service"] == "pdserve.live"
            assert "service" not in container["readinessProbe"]["grpc"]


def test_rendering_again_gives_the_same_files(tmp_path: Path) -> None:
    render(GOLDEN / "plans" / "h200.yaml", tmp_path / "again")
    first = rendered("h200")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    again = sorted(
        path.relative_to(tmp_path / "again")
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    )
    assert files == again
    for path in files:
        assert (first / path).read_bytes() == (tmp_path / "again" / path).read_bytes()
