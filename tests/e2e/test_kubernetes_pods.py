"""The rendered pods, run: their own commands, settings, names, probes, and the policies' edges.

One cluster for the whole file: 2 routers, 2 prefill and 2 decode workers with the timed engine,
each in namespaces of its own. The tests build on each other, in order.
"""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.kubelet import Kubelet, PodPlan, kind_of, pod_plans
from tests.support.kubernetes_manifests import GOLDEN, build, needs_kubectl, render
from tests.support.pods import NODE_IP, REPO, why_no_pods

pytestmark = [
    needs_kubectl,
    pytest.mark.skipif(bool(why_no_pods()), reason=f"no namespaces here: {why_no_pods()}"),
]

START_S = 90.0
OPTIONS = ("--engine", "timed", "--set", "timers.drain_s=5")


class PacketLog:
    """Who opened what in the cluster so far."""

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet
        self._seen: list[tuple[str, str, str, int]] = []
        self._process = kubelet.node.start(["python", str(REPO / "tests/support/packet_log.py")])
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            source, target, protocol, port = json.loads(line)
            self._seen.append((source, target, protocol, port))

    def edges(self) -> set[tuple[str, str, str, int]]:
        """By kinds of pods; the node's probes are no pod's traffic, policies never stop them."""
        kinds = {pod.endpoint.ip: kind_of(pod.endpoint) for pod in self._kubelet.pods.values()}
        return {
            (kinds.get(source, source), kinds.get(target, target), protocol, port)
            for source, target, protocol, port in self._seen
            if source != NODE_IP
        }


@pytest.fixture(scope="module")
def kubelet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    folder = tmp_path_factory.mktemp("pods")
    render(GOLDEN / "plans" / "cpu.yaml", folder / "rendered", *OPTIONS)
    objects = build(folder / "rendered" / "overlays" / "monitoring")
    smoke = build(folder / "rendered" / "smoke")
    with Kubelet([*objects, *smoke], folder) as running:
        yield running


@pytest.fixture(scope="module")
def packets(kubelet: Kubelet) -> PacketLog:
    return PacketLog(kubelet)


def servers(kubelet: Kubelet) -> list[PodPlan]:
    return [plan for plan in pod_plans(kubelet.objects) if "ports" in plan.container]


def smoke_plan(kubelet: Kubelet) -> PodPlan:
    (plan,) = [plan for plan in pod_plans(kubelet.objects) if "ports" not in plan.container]
    return plan


def smoke(kubelet: Kubelet) -> tuple[int, str]:
    """The smoke Job's own command in its own pod, which is made at the first call."""
    plan = smoke_plan(kubelet)
    pod = kubelet.pods.get(plan.name) or kubelet.create(plan)
    return pod.ask(*kubelet.command_of(plan, pod))


def test_every_pod_starts_and_its_probes_pass(kubelet: Kubelet, packets: PacketLog) -> None:
    plans = servers(kubelet)
    assert [plan.container["name"] for plan in plans].count("router") == 2
    assert len(plans) == 6
    for plan in plans:
        kubelet.start(plan)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for plan in plans:
            kubelet.wait_until(plan.name, probe, passes=True, within_s=START_S)


def test_processes_listen_on_the_declared_ports_alone(kubelet: Kubelet) -> None:
    for plan in servers(kubelet):
        pod = kubelet.pods[plan.name]
        listening = re.findall(r":(\d+)\s+\S+:\*", pod.run("ss -Hltn"))
        assert sorted(map(int, listening)) == sorted(pod.endpoint.ports.values())


def test_the_smoke_job_passes(kubelet: Kubelet) -> None:
    code, said = smoke(kubelet)
    assert code == 0, said


def test_prometheus_reads_every_pod(kubelet: Kubelet) -> None:
    labels = {"app.kubernetes.io/name": "prometheus"}
    prometheus = kubelet.node.pod("prometheus", namespace="monitoring", labels=labels)
    kubelet.pods["prometheus"] = prometheus
    (monitor,) = [each for each in kubelet.objects if each["kind"] == "PodMonitor"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    selector = monitor["spec"]["selector"]["matchLabels"].items()
    targets = [plan for plan in servers(kubelet) if selector <= plan.labels.items()]
    assert len(targets) == 6
    for plan in targets:
        pod = kubelet.pods[plan.name].endpoint
        url = f"http://{pod.ip}:{pod.ports[endpoint['port']]}{endpoint['path']}"
        script = f"import urllib.request as u; print(u.urlopen('{url}', timeout=5).read().decode())"
        code, said = prometheus.ask(["python", "-c", script])
        assert code == 0, said
        assert "# TYPE pdserve_" in said


def test_connections_are_the_policies_edges_and_no_others(
    kubelet: Kubelet, packets: PacketLog
) -> None:
    client = smoke_plan(kubelet).name
    allowed = kubelet.allowed_edges()
    assert allowed == {
        (client, "router", "TCP", 7450),
        ("router", "decode", "TCP", 7460),
        ("decode", "prefill", "TCP", 7460),
        ("decode", "prefill", "TCP", 7461),
        ("prefill", "router", "TCP", 7451),
        ("decode", "router", "TCP", 7451),
        *(("prometheus", role, "TCP", 7452) for role in ("router", "prefill", "decode")),
        *((role, "kube-dns", "UDP", 53) for role in ("prefill", "decode", client)),
        *((role, "kube-dns", "TCP", 53) for role in ("prefill", "decode", client)),
    }
    # TCP is for answers that a packet cannot hold.
    used = {edge for edge in allowed if edge[1:3] != ("kube-dns", "TCP")}
    assert packets.edges() == used


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed: nothing is enforced")
def test_with_policies_enforced_new_pods_join_and_strangers_stay_out(kubelet: Kubelet) -> None:
    (plan,) = [plan for plan in servers(kubelet) if plan.name == "pdserve-decode-1"]
    assert kubelet.terminate(plan.name) == 0
    again = PodPlan(name="pdserve-decode-2", namespace=plan.namespace, template=plan.template)
    pod = kubelet.create(again)
    stranger = kubelet.node.pod("stranger", namespace="pdserve", labels={})
    kubelet.pods["stranger"] = stranger
    kubelet.enforce_policies()
    pod.start(*kubelet.command_of(again, pod))
    kubelet.wait_until(again.name, "readinessProbe", passes=True, within_s=START_S)
    router = next(each for each in kubelet.pods.values() if kind_of(each.endpoint) == "router")
    address = f"{router.endpoint.ip}:7450"
    code, _ = stranger.ask(["python", "-m", "pdserve.rpc.probe", address])
    assert code != 0
    code, said = smoke(kubelet)
    assert code == 0, said
    joined = [name for name in kubelet.pods if name.startswith("pdserve-decode")]
    assert sorted(joined) == ["pdserve-decode-0", "pdserve-decode-2"]


def test_a_router_that_ends_is_out_of_service_first(kubelet: Kubelet) -> None:
    router, other = [name for name in kubelet.plans if name.startswith("pdserve-router")]
    pre_stop = kubelet.plans[router].container["lifecycle"]["preStop"]["exec"]["command"]
    started = time.monotonic()
    code, said = kubelet.pods[router].ask(pre_stop)
    assert (code, said) == (0, "")
    lasted_s = time.monotonic() - started
    drain_s = 5
    grace_s = kubelet.plans[router].template["spec"]["terminationGracePeriodSeconds"]
    assert lasted_s + drain_s < grace_s
    assert kubelet.probe(router, "readinessProbe")
    assert kubelet.terminate(router) == 0
    assert kubelet.probe(other, "readinessProbe")
    code, said = smoke(kubelet)
    assert code == 0, said


def test_a_worker_without_routers_is_live_and_not_ready(kubelet: Kubelet) -> None:
    (router,) = [name for name in kubelet.plans if name.startswith("pdserve-router")]
    assert kubelet.terminate(router) == 0
    kubelet.wait_until("pdserve-prefill-0", "readinessProbe", passes=False, within_s=20)
    assert kubelet.probe("pdserve-prefill-0", "livenessProbe")


def test_a_stopped_worker_is_not_live(kubelet: Kubelet) -> None:
    process = kubelet.pods["pdserve-prefill-1"].process
    assert process is not None
    subprocess.run(["kill", "-STOP", str(process.pid)], check=True)
    kubelet.wait_until("pdserve-prefill-1", "livenessProbe", passes=False, within_s=20)
    subprocess.run(["kill", "-CONT", str(process.pid)], check=True)
    kubelet.wait_until("pdserve-prefill-1", "livenessProbe", passes=True, within_s=20)


def test_nothing_was_written_but_in_memory(kubelet: Kubelet, tmp_path: Path) -> None:
    pod = kubelet.pods["pdserve-prefill-0"]
    assert "denied" in pod.run("touch /usr/x 2>&1 || echo denied")
    assert pod.run("touch /tmp/x && echo written") == "written\n"
