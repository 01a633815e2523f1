"""The Dockerfiles, read: what they copy exists, what they install is locked, nothing floats."""

import re
import tomllib
from pathlib import Path

import pytest

from deploy.kubernetes.pods import USER_ID
from deploy.kubernetes.values import KV_PORT, METRICS_PORT, ROUTER_PORT, WORKER_PORT

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
NAMES = ("router", "worker")
HEAVY = {"torch", "numba", "llvmlite", "transformers", "safetensors"}


def instructions(name: str) -> list[tuple[str, str]]:
    """Instruction and arguments of each line, continued lines joined."""
    text = (DOCKER / f"{name}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def locked(name: str) -> dict[str, str]:
    """Package to version; every one must have a hash."""
    text = (DOCKER / f"{name}.lock").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}$", line) for line in lines)
    return dict(line.split()[0].split("==") for line in lines)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_exists_and_is_sent_to_the_builder(name: str) -> None:
    sent = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copies = [rest for word, rest in instructions(name) if word == "COPY"]
    sources = [source for rest in copies if "--from=" not in rest for source in rest.split()[:-1]]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in sent, source


@pytest.mark.parametrize("name", NAMES)
def test_base_images_have_exact_versions(name: str) -> None:
    found = dict(
        rest.split("=", 1) for word, rest in instructions(name) if word == "ARG" and "=" in rest
    )
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", found["PYTHON_IMAGE"])
    bases = [rest.split()[0] for word, rest in instructions(name) if word == "FROM"]
    assert bases == ["${PYTHON_IMAGE}"] * 2


@pytest.mark.parametrize("name", NAMES)
def test_containers_run_as_the_user_that_manifests_name(name: str) -> None:
    users = [rest for word, rest in instructions(name) if word == "USER"]
    assert users == [f"{USER_ID}:{USER_ID}"]


@pytest.mark.parametrize("name", NAMES)
def test_every_installation_is_locked(name: str) -> None:
    runs = " ".join(rest for word, rest in instructions(name) if word == "RUN")
    for command in re.findall(r"pip install (.*?)(?:&&|$)", runs):
        is_own = "--no-deps" in command and "/build/source" in command
        is_torch = "torch==" in command and "-c /build/constraints.txt" in command
        assert "--require-hashes" in command or is_own or is_torch, command


def test_torch_has_the_locked_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(r"^torch==(\S+)$", constraints, re.MULTILINE)
    runs = " ".join(rest for word, rest in instructions("worker") if word == "RUN")
    assert f"torch=={version}" in runs


@pytest.mark.parametrize("name", NAMES)
def test_locks_agree_with_the_constraints(name: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = {normal(line.split("==")[0]): line.split("==")[1] for line in lines if line}
    packages = locked(name)
    assert len(packages) > 30
    for package, version in packages.items():
        # setuptools comes with torch and is of the build, not of the constraints.
        if package != "setuptools":
            assert constraints[normal(package)] == version, f"{package}: scripts/lock_images.py"


@pytest.mark.parametrize(("name", "extra"), [("router", ""), ("worker", "worker")])
def test_locks_hold_what_the_package_requires(name: str, extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"].get(extra, [])]
    names = {normal(re.split(r"[<>=!;\[ ]", line)[0]) for line in required} - {"torch"}
    assert names <= {normal(package) for package in locked(name)}


def test_the_router_image_is_light() -> None:
    assert not HEAVY & set(locked("router"))
    assert "torch" not in "".join(rest for _, rest in instructions("router"))


def test_declared_ports_are_the_manifests_ports() -> None:
    ports = {name: dict(instructions(name))["EXPOSE"].split() for name in NAMES}
    assert ports["router"] == [str(ROUTER_PORT), "7451", str(METRICS_PORT)]
    assert ports["worker"] == [str(WORKER_PORT), str(KV_PORT), str(METRICS_PORT)]
