from typing import Any

import pytest

from deploy import gpus as machine
from deploy.deployment import PlacedWorker
from deploy.gpus import assign_gpus, gpu_environment, num_gpus, visible_gpus
from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.errors import LocalFault
from pdserve.domain.messages import Role

FOUR = ("0", "1", "2", "3")


def worker(name: str, device: str = "cuda", gpu: str = "", **engine: Any) -> PlacedWorker:
    told = EngineSettings.model_validate({"device": device, **engine})
    return PlacedWorker(
        settings=WorkerSettings(role=Role.DECODE, worker_id=name, engine=told), gpu=gpu
    )


def test_no_two_workers_get_one_gpu() -> None:
    workers = [worker("a", tp=2), worker("c", "cpu"), worker("b"), worker("d", "cuda:0")]
    found = assign_gpus(workers, FOUR, share=False)
    assert found == {"a": ("1", "2"), "b": ("3",), "d": ("0",)}


def test_too_few_gpus_are_told_with_what_to_do() -> None:
    with pytest.raises(LocalFault) as caught:
        assign_gpus([worker("a", gpu="h200_sxm", tp=4), worker("b")], FOUR, share=False)
    said = caught.value.message
    assert said.startswith("the workers need 5 GPUs (h200_sxm); this machine has 4: start it wh")
    for hint in ("--backend ray", "--scale", "--device cpu", "--engine timed", "share_gpus: true"):
        assert hint in said


def test_a_gpu_named_for_two_workers_is_refused_unless_they_may_share_it() -> None:
    workers = [worker(name, "cuda:1", memory_fraction=0.5) for name in "ab"]
    with pytest.raises(LocalFault, match="device: GPU 1 is named for 2 workers: give each its own"):
        assign_gpus(workers, FOUR, share=False)
    assert assign_gpus(workers, FOUR, share=True) == {"a": ("1",), "b": ("1",)}
    with pytest.raises(LocalFault, match="device cuda:9, and this machine has 4 GPUs, counted fr"):
        assign_gpus([worker("a", "cuda:9")], FOUR, share=True)


@pytest.mark.parametrize("num_gpus", range(1, 6))
@pytest.mark.parametrize("num_workers", range(1, 8))
def test_shared_gpus_are_used_evenly(num_gpus: int, num_workers: int) -> None:
    names = FOUR[:num_gpus]
    share = 1 / -(-num_workers // len(names))
    workers = [worker(f"w{index}", memory_fraction=share) for index in range(num_workers)]
    used = [gpu for own in assign_gpus(workers, names, share=True).values() for gpu in own]
    counts = [used.count(gpu) for gpu in names]
    assert sum(counts) == num_workers
    assert max(counts) - min(counts) <= 1


def test_ranks_of_a_worker_never_share_a_gpu() -> None:
    with pytest.raises(LocalFault, match="a needs 5 GPUs, one a rank; this machine has 4"):
        assign_gpus([worker("a", tp=5)], FOUR, share=True)
    workers = [worker("a", tp=2, memory_fraction=0.4), worker("b", pp=4, memory_fraction=0.4)]
    found = assign_gpus(workers, FOUR, share=True)
    assert [len(set(own)) for own in found.values()] == [2, 4]


def test_workers_that_share_a_gpu_cannot_have_more_memory_than_it_has() -> None:
    workers = [worker("a"), worker("b"), worker("c", memory_fraction=0.1)]
    with pytest.raises(LocalFault) as caught:
        assign_gpus(workers, FOUR[:1], share=True)
    assert caught.value.message == (
        "memory_fraction: 3 workers share GPU 0 and would take 1.9 of its memory: give at most 0.33"
    )


def test_timed_engines_need_no_gpu() -> None:
    nothing = {"fixed_s": 0, "prefill_token_s": 0, "decode_token_s": 0}
    timed = worker("a", engine="timed", coefficients=nothing, tp=8)
    assert assign_gpus([timed], (), share=False) == {}


def test_gpus_are_those_that_this_process_may_see(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-8e1,"}) == ("3", "GPU-8e1")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "DEV", tmp_path)
    assert num_gpus() == 2
    assert visible_gpus({}) == ("0", "1")


def test_a_process_is_told_its_gpus_unless_it_counts_from_all() -> None:
    assert gpu_environment(worker("a"), ("2", "3")) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert gpu_environment(worker("a", "cuda:2"), ("2",)) == {}
    assert gpu_environment(worker("a", "cpu"), ()) == {}
