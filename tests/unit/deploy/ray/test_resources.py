"""What workers ask Ray for, and what is said where it is not there."""

import pytest

from deploy.deployment import Deployment, PlacedWorker
from deploy.ray.placing import Need, RayNode, Unfit
from deploy.ray.resources import (
    ACCELERATORS,
    RayOptions,
    explain_unfit,
    needs_of,
    parse_gpu_resources,
)
from pdserve.config.processes import EngineSettings, RouterSettings, WorkerSettings
from pdserve.domain.errors import LocalFault
from placement.hardware import catalogue


def deployment(gpu: str, *, tp: int = 1, device: str = "cuda") -> Deployment:
    engine = EngineSettings(tp=tp, device=device)
    settings = WorkerSettings(role="decode", worker_id="decode-0", engine=engine)
    worker = PlacedWorker(settings=settings, gpu=gpu, node=f"{gpu}:3" if gpu else "")
    return Deployment(router=RouterSettings(), workers=(worker,))


def need(gpu: str, options: RayOptions | None = None, *, tp: int = 1, device: str = "cuda") -> Need:
    (found,) = needs_of(deployment(gpu, tp=tp, device=device), options or RayOptions())
    return found


def test_each_rank_asks_for_a_gpu_of_the_plans_type() -> None:
    found = need("h200_sxm", tp=4)
    assert found.bundle == {"CPU": 1.0, "GPU": 1, "accelerator_type:H200": 0.001}
    assert (found.num_ranks, found.group) == (4, "h200_sxm:3")


def test_workers_on_the_cpu_ask_for_cpus_only() -> None:
    assert need("", device="cpu").bundle == {"CPU": 1.0}
    assert need("h200_sxm", device="cpu").bundle == {"CPU": 1.0}
    assert need("", RayOptions(cpus_per_rank=0.5), device="cpu").bundle == {"CPU": 0.5}


def test_ray_says_which_gpu_a_rank_of_no_known_type_gets() -> None:
    assert need("").bundle == {"CPU": 1.0, "GPU": 1}
    for gpu in ("", "h200_sxm"):
        with pytest.raises(LocalFault, match="device cuda:1: Ray says which GPU each rank gets"):
            need(gpu, device="cuda:1")


def test_another_resource_may_stand_for_a_gpu_type() -> None:
    options = RayOptions(gpu_resources=parse_gpu_resources(["h200_sxm=big:2", "mine=small"]))
    assert need("h200_sxm", options, device="cpu").bundle == {"CPU": 1.0, "big": 2}
    assert need("mine", options).bundle == {"CPU": 1.0, "small": 1}


def test_every_type_of_the_catalogue_has_a_name_in_ray() -> None:
    assert set(catalogue()) <= set(ACCELERATORS)


def test_names_are_those_of_ray() -> None:
    accelerators = pytest.importorskip("ray.util.accelerators.accelerators")
    known = {value for value in vars(accelerators).values() if isinstance(value, str)}
    assert set(ACCELERATORS.values()) - known <= {"A30"}  # told by its pattern, not by a constant


def test_type_that_ray_does_not_know_says_what_to_do() -> None:
    with pytest.raises(LocalFault, match="--ray-resource tpu9=RESOURCE"):
        need("tpu9")


@pytest.mark.parametrize("text", ["h200", "h200=", "=x", "h200=x:0", "h200=x:1.2.3", "a b=c"])
def test_bad_ray_resource_is_refused(text: str) -> None:
    with pytest.raises(LocalFault, match="expected GPU_TYPE=RESOURCE"):
        parse_gpu_resources([text])


NODE = RayNode(
    node_id="abcdef0123",
    host="10.0.0.5",
    port=1,
    free={"CPU": 3, "GPU": 0},
    total={"CPU": 64, "GPU": 8, "accelerator_type:A100": 1, "memory": 1e9, "node:10.0.0.5": 1},
)


def test_too_few_resources_are_named_with_what_would_fit() -> None:
    missing = Need(name="decode-1", bundle={"CPU": 1, "GPU": 1}, num_ranks=2)
    message = explain_unfit(Unfit(placed=("prefill-0",), missing=(missing,)), [NODE], {})
    assert "no room for decode-1: decode-1 needs 1 CPU, 1 GPU for each of 2 ranks" in message
    assert "workers that would fit: prefill-0" in message
    assert "10.0.0.5 (abcdef): 3 of 64 CPU, 0 of 8 GPU" in message
    assert "--scale" in message


def test_type_that_no_node_has_is_named_with_what_there_is() -> None:
    missing = Need(name="decode-1", bundle={"GPU": 1, "accelerator_type:H100": 0.001})
    unfit = Unfit(placed=(), missing=(missing,))
    message = explain_unfit(unfit, [NODE], {"decode-1": "h100_sxm"})
    assert "no node of the Ray cluster has accelerator_type:H100 (the plan's h100_sxm)" in message
    assert "10.0.0.5 (abcdef): 64 CPU, 8 GPU, 1 accelerator_type:A100;" in message
