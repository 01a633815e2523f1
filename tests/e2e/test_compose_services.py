"""The rendered Compose services, run: own commands and settings, names resolved, health checked.

Every service is in network and mount namespaces of its own, as a container would be.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.commands_render import app
from tests.support.kubernetes_manifests import GOLDEN
from tests.support.pods import REPO, Node, Pod, why_no_pods, write_zone

pytestmark = pytest.mark.skipif(bool(why_no_pods()), reason=f"no namespaces here: {why_no_pods()}")

START_S = 90.0
LOOK_EVERY_S = 0.2
Service = dict[str, Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compose") / "project"
    plan = str(GOLDEN / "plans" / "cpu.yaml")
    arguments = ["compose", plan, "-o", str(folder), "--engine", "timed"]
    result = CliRunner().invoke(app, [*arguments, "--set", "timers.drain_s=5"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def services(project: Path) -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load((project / "compose.yaml").read_text())["services"]
    return found


@pytest.fixture(scope="module")
def running(project: Path, services: dict[str, Service]) -> Iterator[dict[str, Pod]]:
    """All services, and a name server that knows them as Docker's does."""
    folder = project.parent
    zone = folder / "zone.json"
    with Node(folder) as node:
        write_zone(zone, {})
        dns = node.pod("dns", namespace="docker", labels={})
        dns.start(["python", str(REPO / "tests/support/dns_stub.py"), str(zone)])
        etc_of = {
            name: _etc(project, folder / f"{name}-root", service, dns.endpoint.ip)
            for name, service in services.items()
        }
        pods = {
            name: node.pod(
                name, namespace="docker", labels={}, etc=etc_of[name], memory_mounts=_tmpfs(service)
            )
            for name, service in services.items()
        }
        write_zone(zone, {name: [pod.endpoint.ip] for name, pod in pods.items()})
        for name, service in services.items():
            if "profiles" not in service:
                pods[name].start(service["command"], env=service["environment"])
        yield pods


def test_every_service_becomes_healthy(
    running: dict[str, Pod], services: dict[str, Service]
) -> None:
    deadline = time.monotonic() + START_S
    waiting = {name for name, service in services.items() if "healthcheck" in service}
    assert waiting == {"router", "prefill-0", "prefill-1", "decode-0", "decode-1"}
    while waiting:
        for name in sorted(waiting):
            kind, *command = services[name]["healthcheck"]["test"]
            assert kind == "CMD"
            code, said = running[name].ask(command)
            if code == 0:
                waiting.discard(name)
            assert time.monotonic() < deadline, (name, said, running[name].log_path.read_text())
        time.sleep(LOOK_EVERY_S)


def test_the_smoke_service_passes(running: dict[str, Pod], services: dict[str, Service]) -> None:
    smoke = services["smoke"]
    code, said = running["smoke"].ask([*smoke["command"], "--json"], smoke["environment"])
    assert code == 0, said
    checks = json.loads(said)
    assert "prefill-" in json.dumps(checks), "no KV was handed over"


def _etc(project: Path, root: Path, service: Service, dns_ip: str) -> Path:
    etc = root / "etc"
    etc.mkdir(parents=True)
    (etc / "resolv.conf").write_text(f"nameserver {dns_ip}\n")
    (etc / "nsswitch.conf").write_text("hosts: files dns\n")
    configs = yaml.safe_load((project / "compose.yaml").read_text())["configs"]
    for config in service.get("configs", []):
        target = root / config["target"].lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((project / configs[config["source"]]["file"]).read_text())
    return etc


def _tmpfs(service: Service) -> dict[str, str]:
    found = {}
    for mount in service["tmpfs"]:
        path, _, options = mount.partition(":")
        found[path] = dict(option.split("=") for option in options.split(","))["size"]
    return found
