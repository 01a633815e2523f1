"""`pdserve render`: what it refuses, what it says, and what a Compose project holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.commands_render import app
from deploy.kubernetes.accelerators import accelerator, parse_gpu_label
from deploy.kubernetes.values import RenderOptions, check_image
from deploy.output_folder import write_files
from pdserve.domain.errors import LocalFault
from placement.hardware import catalogue

PLANS = Path(__file__).parents[2] / "golden" / "kubernetes" / "plans"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def changed_plan(folder: Path, name: str = "cpu", **changes: Any) -> Path:
    data = yaml.safe_load((PLANS / f"{name}.yaml").read_text())
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}))
    return path


@pytest.mark.parametrize("place", ["kubernetes", "compose"])
def test_a_plan_of_another_version_is_refused(tmp_path: Path, place: str) -> None:
    plan = changed_plan(tmp_path, version=7)
    with pytest.raises(LocalFault, match="version 7 is not known here"):
        run(place, str(plan), "-o", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_gpu_is_refused_with_the_nearest(tmp_path: Path) -> None:
    pools = yaml.safe_load((PLANS / "h200.yaml").read_text())["pools"]
    plan = changed_plan(tmp_path, "h200", pools=[{**pool, "gpu": "h20O_sxm"} for pool in pools])
    with pytest.raises(LocalFault, match="did you mean h200_sxm"):
        run("kubernetes", str(plan), "-o", str(tmp_path / "out"))


def test_a_gpu_type_of_ones_own_needs_a_label(tmp_path: Path) -> None:
    gpus = tmp_path / "gpus.yaml"
    own = {
        "name": "my_gpu",
        "memory_gib": 100,
        "memory_gb_per_s": 3000,
        "bf16_tflops": 900,
        "tdp_w": 500,
        "intra_node_gb_per_s": 400,
        "inter_node_gb_per_s": 50,
    }
    gpus.write_text(yaml.safe_dump({"gpus": [own]}))
    pools = yaml.safe_load((PLANS / "h200.yaml").read_text())["pools"]
    pools = [{**pool, "gpu": "my_gpu", "nodes": []} for pool in pools]
    plan = changed_plan(tmp_path, "h200", pools=pools)
    arguments = ["kubernetes", str(plan), "-o", str(tmp_path / "out"), "--gpus-file", str(gpus)]
    with pytest.raises(LocalFault, match="--gpu-label my_gpu=LABEL=VALUE"):
        run(*arguments)
    run(*arguments, "--gpu-label", "my_gpu=nvidia.com/gpu.product=My-GPU")
    text = (tmp_path / "out" / "base" / "decode.yaml").read_text()
    assert "- My-GPU" in text
    assert "nvidia.com/gpu: 4" in text


def test_every_type_of_the_catalogue_has_nodes() -> None:
    for name in catalogue():
        found = accelerator(name, {})
        assert found.resource.split("/")[0] == found.label.split("/")[0]
        assert found.values


@pytest.mark.parametrize("text", ["x", "x=y", "x=y=", "a=b=c=d"])
def test_a_gpu_label_without_three_parts_is_refused(text: str) -> None:
    with pytest.raises(LocalFault, match="TYPE=LABEL=VALUE"):
        parse_gpu_label(text)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("pdserve-router", "exact version"),
        ("pdserve-router:latest", "the tag latest moves"),
        ("host:5000/pdserve-router:main", "the tag main moves"),
        ("Pdserve:1.0", "exact version"),
        ("pdserve@sha256:12", "exact version"),
    ],
)
def test_floating_images_are_refused(image: str, why: str) -> None:
    with pytest.raises(LocalFault, match=why):
        check_image(image, "--image-router")


@pytest.mark.parametrize(
    "image", ["pdserve-router:1.2.3", "host:5000/team/x:v1", f"a/b@sha256:{'0' * 64}"]
)
def test_exact_images_are_taken(image: str) -> None:
    check_image(image, "--image-router")


@pytest.mark.parametrize("name", ["", "Big", "-x", "x" * 41, "a.b"])
def test_names_that_kubernetes_would_refuse_are_refused(name: str) -> None:
    with pytest.raises(LocalFault, match="lower case letters"):
        RenderOptions(name=name)


# The folder


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LocalFault, match="is not empty; --overwrite"):
        write_files(tmp_path, {"a.yaml": "x"}, overwrite=False)
    with pytest.raises(LocalFault, match="files that pdserve did not render"):
        write_files(tmp_path, {"a.yaml": "x"}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwriting_leaves_nothing_of_the_earlier_rendering(tmp_path: Path) -> None:
    write_files(tmp_path, {"old/a.yaml": "x"}, overwrite=False)
    with pytest.raises(LocalFault, match="is not empty"):
        write_files(tmp_path, {"new/b.yaml": "y"}, overwrite=False)
    write_files(tmp_path, {"new/b.yaml": "y"}, overwrite=True)
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "new" / "b.yaml").read_text() == "y"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(LocalFault, match="is a file"):
        write_files(file, {"a": "x"}, overwrite=False)
    with pytest.raises(LocalFault, match=r"file/deeper.*: Not a directory"):
        write_files(file / "deeper", {"a": "x"}, overwrite=False)


# What is said


def test_json_tells_files_pools_and_warnings(tmp_path: Path) -> None:
    plan = str(PLANS / "spanning.yaml")
    said = json.loads(run("kubernetes", plan, "-o", str(tmp_path / "out"), "--json"))
    assert "base/kustomization.yaml" in said["files"]
    assert {pool["name"]: pool["replicas"] for pool in said["pools"]} == {
        "prefill-mi300x-tp4": 2,
        "prefill-h100-sxm-tp8": 1,
        "decode": 2,
    }
    assert any("ranks span 2 nodes" in warning for warning in said["warnings"])
    gpus = {pool["name"]: pool["gpus_per_worker"] for pool in said["pools"]}
    assert gpus == {"prefill-mi300x-tp4": 4, "prefill-h100-sxm-tp8": 8, "decode": 16}
    assert any("--model-claim" in warning for warning in said["warnings"])


def test_containers_may_have_the_model_elsewhere(tmp_path: Path) -> None:
    arguments = ["--model-claim", "models", "--model", "/models/mine", "--json"]
    plan = str(PLANS / "cpu.yaml")
    said = json.loads(run("kubernetes", plan, "-o", str(tmp_path / "out"), *arguments))
    assert said["warnings"] == []
    base = tmp_path / "out" / "base"
    for pod in ("router", "prefill"):
        text = (base / f"{pod}.yaml").read_text()
        assert "claimName: models" in text
        assert "mountPath: /models\n          readOnly: true" in text
        assert "model: /models/mine\n" in (base / "settings" / f"{pod}.yaml").read_text()


def test_a_model_of_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match="render where its folder is"):
        run(
            "kubernetes",
            str(changed_plan(tmp_path, model="nobody/none")),
            "-o",
            str(tmp_path / "o"),
        )


def test_the_timed_engine_asks_for_no_gpu(tmp_path: Path) -> None:
    plan, times = (
        changed_plan(tmp_path, "h200"),
        "{fixed_s: 0.01, prefill_token_s: 0.0001, decode_token_s: 0.0001}",
    )
    arguments = ["--engine", "timed", "--model", "demo", "--set", f"coefficients={times}", "--json"]
    said = json.loads(run("kubernetes", str(plan), "-o", str(tmp_path / "out"), *arguments))
    assert said["warnings"] == []
    text = (tmp_path / "out" / "base" / "decode.yaml").read_text()
    assert "gpu:" not in text
    assert "nodeAffinity" not in text


def test_a_cluster_file_renders_too(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{prefill: {replicas: 0}, decode: {replicas: 3, num_blocks: 99}}")
    run("kubernetes", str(cluster), "-o", str(tmp_path / "out"))
    base = tmp_path / "out" / "base"
    assert not (base / "prefill.yaml").exists()
    assert not (base / "settings" / "plan.yaml").exists()
    stateful, _ = yaml.safe_load_all((base / "decode.yaml").read_text())
    assert stateful["spec"]["replicas"] == 3
    assert "num_blocks: 99" in (base / "settings" / "decode.yaml").read_text()


@pytest.mark.parametrize("place", ["kubernetes", "compose"])
def test_ranks_among_which_a_model_that_is_here_cannot_be_divided_are_refused(
    place: str, tmp_path: Path
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{decode: {tp: 3}}")
    with pytest.raises(LocalFault, match="cannot be served with tp 3: its 2 KV heads"):
        run(place, str(cluster), "-o", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_ranks_of_a_model_that_is_elsewhere_are_noted(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{decode: {tp: 2}}")
    said = json.loads(run("kubernetes", str(cluster), "-o", str(tmp_path / "out"), "--json"))
    assert not any("was not checked" in warning for warning in said["warnings"])
    plan = str(PLANS / "spanning.yaml")
    said = json.loads(run("kubernetes", plan, "-o", str(tmp_path / "other"), "--json"))
    [note] = [warning for warning in said["warnings"] if "was not checked" in warning]
    assert "no model directory at" in note


# Compose


def test_compose_services_are_locked_down(tmp_path: Path) -> None:
    run("compose", str(PLANS / "cpu.yaml"), "-o", str(tmp_path / "out"))
    project = yaml.safe_load((tmp_path / "out" / "compose.yaml").read_text())
    services = project["services"]
    assert set(services) == {"router", "prefill-0", "prefill-1", "decode-0", "decode-1", "smoke"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"].split(":")[0] != "0"
        assert service["mem_limit"]
        assert service["cpus"]
        assert service["image"].rpartition(":")[2][0].isdigit()
    assert services["router"]["ports"] == ["127.0.0.1:7450:7450"]
    assert project["networks"]["cluster"] == {"internal": True}
    assert [name for name, each in services.items() if "ports" in each] == ["router"]
    for name in ("prefill-0", "decode-1"):
        assert services[name]["networks"] == ["cluster"]
    settings = yaml.safe_load((tmp_path / "out" / "settings" / "router.yaml").read_text())
    assert (settings["max_num_waiting"], settings["insecure"]) == (40, True)


def test_compose_gives_each_worker_gpus_of_its_own(tmp_path: Path) -> None:
    run("compose", str(PLANS / "h200.yaml"), "-o", str(tmp_path / "out"), "--scale", "0.15")
    project = yaml.safe_load((tmp_path / "out" / "compose.yaml").read_text())
    given = [
        device["device_ids"]
        for service in project["services"].values()
        for device in service.get("deploy", {})
        .get("resources", {})
        .get("reservations", {})
        .get("devices", [])
    ]
    assert given == [["0", "1"], ["2", "3"], ["4", "5", "6", "7"]]


@pytest.mark.parametrize(
    ("name", "why"), [("h200", "48 GPUs and one machine has 8"), ("spanning", "2 types of GPU")]
)
def test_compose_refuses_a_plan_for_more_than_one_machine(
    tmp_path: Path, name: str, why: str
) -> None:
    with pytest.raises(LocalFault, match=why):
        run("compose", str(PLANS / f"{name}.yaml"), "-o", str(tmp_path / "out"))
