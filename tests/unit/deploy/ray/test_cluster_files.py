"""The cluster files for `ray up`, against Ray's own schema; no cloud is asked."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

util = pytest.importorskip("ray.autoscaler._private.util", reason="the extra ray is not installed")

import deploy.ray  # noqa: E402

FILES = sorted(Path(deploy.ray.__file__).parent.glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_what_ray_up_takes(path: Path) -> None:
    util.validate_config(util.prepare_config(read(path)))
    with pytest.raises(Exception, match="unexpected"):
        util.validate_config(util.prepare_config({**read(path), "no_such_field": 1}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nodes_install_the_versions_that_are_tested_here(path: Path) -> None:
    commands = "\n".join(read(path)["setup_commands"])
    assert f"ray[default]=={version('ray')}" in commands
    (torch,) = re.findall(r"torch==(\S+)", commands)
    assert version("torch").partition("+")[0] == torch


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dashboard_and_jobs_are_reached_through_the_head_only(path: Path) -> None:
    (head,) = [each for each in read(path)["head_start_ray_commands"] if "ray start" in each]
    assert "--dashboard-host=127.0.0.1" in head


def test_there_is_one_for_a_cloud_and_one_for_machines_at_hand() -> None:
    assert {read(path)["provider"]["type"] for path in FILES} == {"aws", "local"}
