"""Rendered manifests as a cluster gets them: by `pdserve render` and `kubectl kustomize`."""

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils as kubernetes_schemas
from typer.testing import CliRunner

from deploy.commands_render import app

Object = dict[str, Any]

GOLDEN = Path(__file__).parents[1] / "golden" / "kubernetes"
PLANS = ("cpu", "h200", "spanning")
BUILDS = ("base", "overlays/dev", "overlays/production", "overlays/monitoring", "smoke")
IMAGES = ("--image-router", "pdserve-router:1.2.3", "--image-worker", "pdserve-worker:1.2.3")
KUBERNETES_VERSIONS = [f"1.{minor}" for minor in range(29, 38)]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: manifests are not built"
)


def render(plan: Path, folder: Path, *arguments: str) -> None:
    """`pdserve render kubernetes`; fails with its message where it does not end well."""
    result = CliRunner().invoke(
        app, ["kubernetes", str(plan), "-o", str(folder), *IMAGES, *arguments]
    )
    assert result.exit_code == 0, (result.output, result.exception)


@functools.cache
def rendered(plan: str) -> Path:
    """Folder of one of the golden plans' manifests, rendered once; removed at exit."""
    folder = Path(_folder().name) / plan
    render(GOLDEN / "plans" / f"{plan}.yaml", folder)
    return folder


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pdserve-manifests-")


def build(folder: Path) -> list[Object]:
    """What `kubectl kustomize` makes of a folder; it must have nothing to complain about."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def built(plan: str, overlay: str) -> tuple[Object, ...]:
    """A golden plan's overlay, built once."""
    return tuple(build(rendered(plan) / overlay))


def find(objects: tuple[Object, ...] | list[Object], kind: str, name: str) -> Object:
    (found,) = [
        each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def pod_templates(found: Object) -> Iterator[Object]:
    """Every pod template inside an object."""
    spec = found.get("spec", {})
    if found["kind"] == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        yield from (group[name] for name in ("leaderTemplate", "workerTemplate") if name in group)
    elif found["kind"] in ("Deployment", "StatefulSet", "Job"):
        yield spec["template"]


def validate(found: Object, version: str) -> None:
    """Raise for any field, type or kind that this version of Kubernetes does not know.

    Custom resources are checked against schemas of our own that know only what we use.
    """
    schema_file = GOLDEN / "schemas" / f"{found['kind']}.yaml"
    if not schema_file.exists():
        kubernetes_validate.validate(found, version, strict=True)
        return
    schema = yaml.safe_load(schema_file.read_text())
    jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)
    assert set(found["metadata"]) <= {"name", "namespace", "labels", "annotations"}
    for template in pod_templates(found):
        whole = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "inside"},
            "template": template,
        }
        kubernetes_validate.validate(whole, version, strict=True)


@pytest.fixture
def read_schemas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package parses megabytes of JSON again for each object."""
    monkeypatch.setattr(kubernetes_schemas, "schema_contents", _schema_contents)


_schema_contents = functools.cache(kubernetes_schemas.schema_contents)
