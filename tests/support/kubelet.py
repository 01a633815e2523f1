"""Manifests as running processes: each pod's own command, environment, files, ports and probes."""

import json
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.network_policies import Endpoint, allows
from tests.support.pods import NODE_IP, REPO, Node, Pod, write_zone

Object = dict[str, Any]

DOMAIN = "cluster.local"
LWS = "leaderworkerset.sigs.k8s.io"
DNS_LABELS = {"k8s-app": "kube-dns"}
LOOK_EVERY_S = 0.2
NFT_HEAD = """
table inet policies {
 chain input {
  type filter hook input priority 0; policy drop;
  iif lo accept
  ct state established,related accept
  ip saddr %s accept
%s
 }
 chain output {
  type filter hook output priority 0; policy drop;
  oif lo accept
  ct state established,related accept
%s
 }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPlan:
    """One pod that a workload asks for."""

    name: str
    namespace: str
    template: Object

    @property
    def container(self) -> Object:
        (container,) = self.template["spec"]["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def labels(self) -> Mapping[str, str]:
        labels: Mapping[str, str] = self.template["metadata"]["labels"]
        return labels


def pod_plans(objects: Sequence[Object]) -> Iterator[PodPlan]:
    """Pods of all workloads, named and labelled as Kubernetes and LeaderWorkerSet do it."""
    for found in objects:
        if found["kind"] == "LeaderWorkerSet":
            yield from _group_plans(found)
        if found["kind"] not in ("Deployment", "StatefulSet", "Job"):
            continue
        about = found["metadata"]
        for index in range(found["spec"].get("replicas", 1)):
            suffix = f"7d9f8-{'abcdefgh'[index]}" if found["kind"] != "StatefulSet" else index
            yield PodPlan(
                name=f"{about['name']}-{suffix}",
                namespace=about["namespace"],
                template=found["spec"]["template"],
            )


def _group_plans(found: Object) -> Iterator[PodPlan]:
    """Leader I of a set is pod NAME-I, and the others of its group are NAME-I-1, NAME-I-2, ..."""
    about, spec = found["metadata"], found["spec"]
    group = spec["leaderWorkerTemplate"]
    for replica in range(spec["replicas"]):
        leader = f"{about['name']}-{replica}"
        address = f"{leader}.{about['name']}.{about['namespace']}"
        for index in range(group["size"]):
            template = json.loads(
                json.dumps(group["workerTemplate" if index else "leaderTemplate"])
            )
            template["metadata"]["labels"] |= {
                f"{LWS}/group-index": str(replica),
                f"{LWS}/worker-index": str(index),
            }
            (container,) = template["spec"]["containers"]
            # The controller's own come first, so that arguments and other variables may name them.
            own = {"name": "LWS_LEADER_ADDRESS", "value": address}
            container["env"] = [own, *container["env"]]
            yield PodPlan(
                name=f"{leader}-{index}" if index else leader,
                namespace=about["namespace"],
                template=template,
            )


class Kubelet:
    """Runs the pods of `objects` on one node, with a name server that knows the Services."""

    def __init__(self, objects: Sequence[Object], folder: Path) -> None:
        self.objects = list(objects)
        self.node = Node(folder)
        self.pods: dict[str, Pod] = {}
        self.plans: dict[str, PodPlan] = {}
        self._folder = folder
        self._zone_path = folder / "zone.json"

    def __enter__(self) -> Self:
        self.node.__enter__()
        write_zone(self._zone_path, {})
        self.dns = self.node.pod("kube-dns", namespace="kube-system", labels=DNS_LABELS)
        self.pods["kube-dns"] = self.dns
        self.dns.start(["python", str(REPO / "tests/support/dns_stub.py"), str(self._zone_path)])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.node.__exit__(kind, error, trace)

    @property
    def policies(self) -> list[Object]:
        return [each for each in self.objects if each["kind"] == "NetworkPolicy"]

    def create(self, plan: PodPlan) -> Pod:
        """The pod's namespaces, files and names, without its process."""
        spec = plan.template["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        etc = self._etc_of(plan, volumes)
        memory = {
            mount["mountPath"]: volumes[mount["name"]]["emptyDir"]["sizeLimit"].removesuffix("i")
            for mount in plan.container["volumeMounts"]
            if "emptyDir" in volumes[mount["name"]]
        }
        ports = {port["name"]: port["containerPort"] for port in plan.container.get("ports", [])}
        pod = self.node.pod(
            plan.name,
            namespace=plan.namespace,
            labels=plan.labels,
            ports=ports,
            etc=etc,
            memory_mounts=memory,
        )
        self.pods[plan.name], self.plans[plan.name] = pod, plan
        write_zone(self._zone_path, self._zone())
        return pod

    def start(self, plan: PodPlan) -> Pod:
        """Create the pod and run its container's command."""
        pod = self.create(plan)
        pod.start(*self.command_of(plan, pod))
        return pod

    def command_of(self, plan: PodPlan, pod: Pod) -> tuple[list[str], dict[str, str]]:
        """Command with arguments, and environment, with $(NAME) filled in."""
        env: dict[str, str] = {}
        for entry in plan.container.get("env", []):
            value = entry["value"] if "value" in entry else _field(entry, pod, plan)
            env[entry["name"]] = _fill(value, env)
        words = [*plan.container["command"], *plan.container.get("args", [])]
        return [_fill(word, env) for word in words], env

    def probe(self, name: str, kind: str) -> bool:
        """Ask the pod once, as its probe of this kind (`livenessProbe`, ...) says."""
        probe = self.plans[name].container[kind]
        address = f"{self.pods[name].endpoint.ip}:{probe['grpc']['port']}"
        command = ["python", "-m", "pdserve.rpc.probe", address]
        command += ["--service", probe["grpc"].get("service", "")]
        command += ["--timeout", str(probe["timeoutSeconds"])]
        return self.node.check(command) == 0

    def wait_until(self, name: str, kind: str, *, passes: bool, within_s: float) -> None:
        """Probe again and again; fails with the pod's log."""
        deadline = time.monotonic() + within_s
        while self.probe(name, kind) is not passes:
            process = self.pods[name].process
            is_over = process is not None and process.poll() is not None
            if time.monotonic() > deadline or (passes and is_over):
                said = self.pods[name].log_path.read_text()[-3000:]
                raise AssertionError(f"{kind} of {name} is not {passes}:\n{said}")
            time.sleep(LOOK_EVERY_S)

    def terminate(self, name: str) -> int:
        """SIGTERM, and the exit code if it comes within the pod's grace period."""
        process = self.pods[name].process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        grace_s = self.plans[name].template["spec"]["terminationGracePeriodSeconds"]
        code = process.wait(timeout=grace_s)
        del self.pods[name], self.plans[name]
        write_zone(self._zone_path, self._zone())
        return code

    def allowed_edges(self) -> set[tuple[str, str, str, int]]:
        """What the policies let through, between the kinds of pods of which one is ours."""
        endpoints = [pod.endpoint for pod in self.pods.values()]
        return {
            (kind_of(source), kind_of(target), protocol, port)
            for source in endpoints
            for target in endpoints
            for protocol, port in _ports(target)
            if source is not target and (source.name in self.plans or target.name in self.plans)
            if allows(self.policies, source, target, protocol, port)
        }

    def enforce_policies(self) -> None:
        """Have the kernel drop what the policies do not allow, as a cluster's network does."""
        for pod in self.pods.values():
            others = [each.endpoint for each in self.pods.values() if each is not pod]
            own = pod.endpoint
            incoming = [
                f"  ip saddr {other.ip} {protocol.lower()} dport {port} accept"
                for other in others
                for protocol, port in _ports(own)
                if allows(self.policies, other, own, protocol, port)
            ]
            outgoing = [
                f"  ip daddr {other.ip} {protocol.lower()} dport {port} accept"
                for other in others
                for protocol, port in _ports(other)
                if allows(self.policies, own, other, protocol, port)
            ]
            rules = NFT_HEAD % (NODE_IP, "\n".join(incoming), "\n".join(outgoing))
            pod.apply_rules("table inet policies\ndelete table inet policies\n" + rules)

    def _etc_of(self, plan: PodPlan, volumes: Mapping[str, Object]) -> Path:
        """What is laid over /etc: the name server's address and the ConfigMaps' files."""
        root = self._folder / f"{plan.name}-root"
        etc = root / "etc"
        etc.mkdir(parents=True)
        search = " ".join([f"{plan.namespace}.svc.{DOMAIN}", f"svc.{DOMAIN}", DOMAIN])
        resolver = f"nameserver {self.dns.endpoint.ip}\nsearch {search}\noptions ndots:5\n"
        (etc / "resolv.conf").write_text(resolver)
        (etc / "nsswitch.conf").write_text("hosts: files dns\n")
        for mount in plan.container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "configMap" not in volume:
                continue
            target = root / mount["mountPath"].lstrip("/")
            assert target.is_relative_to(etc), "tests lay over /etc alone"
            target.mkdir(parents=True)
            for name, text in self._config_map(volume["configMap"]["name"]).items():
                (target / name).write_text(text)
        return etc

    def _config_map(self, name: str) -> Mapping[str, str]:
        (found,) = [
            each
            for each in self.objects
            if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name
        ]
        data: Mapping[str, str] = found["data"]
        return data

    def _zone(self) -> dict[str, list[str]]:
        """Services by their pods. A ClusterIP is left out: its name leads to the pods at once."""
        zone = {}
        for service in self.objects:
            if service["kind"] != "Service":
                continue
            about, selector = service["metadata"], service["spec"]["selector"]
            chosen = [
                plan
                for plan in self.plans.values()
                if plan.namespace == about["namespace"] and selector.items() <= plan.labels.items()
            ]
            host = f"{about['name']}.{about['namespace']}.svc.{DOMAIN}"
            zone[host] = [self.pods[plan.name].endpoint.ip for plan in chosen]
        for owner in self.objects:
            if owner["kind"] != "LeaderWorkerSet":
                continue
            name, namespace = owner["metadata"]["name"], owner["metadata"]["namespace"]
            for plan in self.plans.values():
                if plan.name.startswith(f"{name}-"):
                    host = f"{plan.name}.{name}.{namespace}.svc.{DOMAIN}"
                    zone[host] = [self.pods[plan.name].endpoint.ip]
        return zone


def kind_of(endpoint: Endpoint) -> str:
    """router, prefill, decode, or the pod's name."""
    return endpoint.labels.get("app.kubernetes.io/component", endpoint.name)


def _ports(endpoint: Endpoint) -> list[tuple[str, int]]:
    if endpoint.labels == DNS_LABELS:
        return [("UDP", 53), ("TCP", 53)]
    return [("TCP", port) for port in endpoint.ports.values()]


def _field(entry: Object, pod: Pod, plan: PodPlan) -> str:
    path = entry["valueFrom"]["fieldRef"]["fieldPath"]
    return {
        "metadata.name": plan.name,
        "metadata.namespace": plan.namespace,
        "status.podIP": pod.endpoint.ip,
        **{f"metadata.labels['{name}']": value for name, value in plan.labels.items()},
    }[path]


def _fill(text: str, env: Mapping[str, str]) -> str:
    """$(NAME) becomes its value where there is one; $$ is a dollar."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", value, text)
