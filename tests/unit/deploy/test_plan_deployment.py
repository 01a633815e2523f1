"""What a plan file becomes: pools as workers, limits as settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.deployment import Deployment
from deploy.opening import read_deployment
from pdserve.config.override import ModelOverride
from pdserve.domain.errors import LocalFault
from pdserve.domain.messages import Role
from tests.support.plans import STEP_TIMES, plan, pool


def opened(tmp_path: Path, data: object, *assignments: str, **options: Any) -> Deployment:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data))
    return read_deployment(path, options.pop("flags", {}), assignments, **options)


def test_pools_become_workers_with_the_plans_limits(tmp_path: Path) -> None:
    deployment = opened(tmp_path, plan())
    names = [worker.name for worker in deployment.workers]
    assert names == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
    for worker in deployment.workers:
        settings = worker.settings
        assert (settings.max_step_tokens, settings.max_num_requests) == (256, 12)
        assert settings.engine.block_size == 8
        assert settings.engine.num_blocks == (500 if settings.role == "prefill" else 1000)
        assert worker.num_gpus == 0
    assert {
        worker.settings.max_local_prefill_tokens for worker in deployment.of_role(Role.DECODE)
    } == {0}
    router = deployment.router
    assert (router.max_num_waiting, router.max_wait_s) == (40, 2.0)
    assert (router.max_rate, router.max_burst) == (20.0, 70)
    assert [(item.name, item.ttft_s, item.tpot_s) for item in router.slo] == [
        ("chat", 0.2, 0.05),
        ("batch", 2.0, 0.1),
    ]
    assert router.max_num_requests >= 3 * 12 + 40
    assert deployment.notes == ()


def test_policy_and_orders_are_those_of_the_plan_unless_others_are_given(tmp_path: Path) -> None:
    default = opened(tmp_path, plan())
    assert default.router.policy == "least_total_time"
    orders = {worker.settings.role: worker.settings.queue_order for worker in default.workers}
    assert orders == {"prefill": None, "decode": None}, "its role's own"
    other = plan(policy="least_requests")
    other["pools"] = [{**each, "queue_order": "deadline"} for each in other["pools"]]
    deployment = opened(tmp_path, other, "prefill.queue_order=fcfs")
    assert deployment.router.policy == "least_requests"
    orders = {worker.settings.role: worker.settings.queue_order for worker in deployment.workers}
    assert orders == {"prefill": "fcfs", "decode": "deadline"}


@pytest.mark.parametrize(("max_wait_s", "queue_s"), [(2.0, 10.0), (60.0, 60.0)])
def test_workers_keep_requests_for_as_long_as_the_router_lets_them_in(
    tmp_path: Path, max_wait_s: float, queue_s: float
) -> None:
    limits = {**plan()["limits"], "max_wait_s": max_wait_s}
    deployment = opened(tmp_path, plan(limits=limits))
    assert deployment.router.timers.queue_s == queue_s
    assert {worker.settings.timers.queue_s for worker in deployment.workers} == {queue_s}


def test_plan_that_limits_no_number_leaves_the_workers_their_own_limit(tmp_path: Path) -> None:
    limits = {**plan()["limits"], "max_num_waiting": 0}
    deployment = opened(tmp_path, plan(limits=limits))
    assert deployment.router.max_num_waiting == 0
    assert {worker.settings.max_num_queued for worker in deployment.workers} == {256}


def test_timed_pipelines_are_said_to_be_slower_than_planned(tmp_path: Path) -> None:
    pools = [pool("colocated", 1, pp=2, step_times=STEP_TIMES)]
    deployment = opened(tmp_path, plan(pools=pools), flags={"engine": "timed"})
    assert "with several stages they are too slow" in deployment.notes[0]


def test_cells_multiply_the_pools(tmp_path: Path) -> None:
    deployment = opened(tmp_path, plan(cells=3))
    assert len(deployment.of_role(Role.PREFILL)) == 6
    assert len(deployment.of_role(Role.DECODE)) == 9
    assert len({worker.name for worker in deployment.workers}) == 15


def test_pools_of_one_role_keep_what_is_their_own_and_are_numbered_through(tmp_path: Path) -> None:
    slow = {**STEP_TIMES, "fixed_s": 0.5}
    pools = [
        pool("prefill", 2, kv_tokens=800, step_times=STEP_TIMES),
        pool("decode", 70, kv_tokens=1600, step_times=STEP_TIMES),
        pool("prefill", 1, tp=2, kv_tokens=80, step_times=slow),
        pool("colocated", 30, kv_tokens=2400, step_times=slow),
    ]
    given = ("prefill.max_num_requests=3", "decode.metrics_port=9000")
    deployment = opened(tmp_path, plan(pools=pools), *given, flags={"engine": "timed"})
    readers, writers = deployment.of_role(Role.PREFILL), deployment.of_role(Role.DECODE)
    assert [each.name for each in readers] == ["prefill-0", "prefill-1", "prefill-2"]
    engines = [each.settings.engine for each in readers]
    assert [(each.num_blocks, each.tp) for each in engines] == [(100, 1), (100, 1), (10, 2)]
    assert [each.coefficients and each.coefficients.fixed_s for each in engines] == [
        *(0.001, 0.001),
        0.5,
    ]
    assert [each.name for each in writers] == [f"decode-{index}" for index in range(100)]
    assert [each.settings.metrics_port for each in writers] == list(range(9000, 9100))
    assert [each.settings.engine.num_blocks for each in writers] == [200] * 70 + [300] * 30
    assert [each.settings.reads for each in writers] == ["none"] * 70 + ["own"] * 30
    assert {each.settings.max_num_requests for each in readers} == {3}
    assert {each.settings.max_num_requests for each in writers} == {12}
    assert deployment.router.max_num_requests == 100 * 12 + 40


def test_override_of_the_plan_reaches_every_worker_unless_another_is_given(tmp_path: Path) -> None:
    short = {"max_context_tokens": 64}
    deployment = opened(tmp_path, plan(override_config=short))
    given = {worker.settings.engine.override_config for worker in deployment.workers}
    assert given == {ModelOverride(max_context_tokens=64)}
    flags = {"override_config": {"max_context_tokens": 32}}
    deployment = opened(tmp_path, plan(override_config=short), flags=flags)
    given = {worker.settings.engine.override_config for worker in deployment.workers}
    assert given == {ModelOverride(max_context_tokens=32)}
    both = "override_config.max_position_embeddings=128"
    deployment = opened(tmp_path, plan(override_config=short), both)
    given = {worker.settings.engine.override_config for worker in deployment.workers}
    assert given == {ModelOverride(max_context_tokens=64, max_position_embeddings=128)}


def test_scaling_keeps_one_of_each_and_says_so(tmp_path: Path) -> None:
    deployment = opened(tmp_path, plan(), scale=0.34)
    assert [worker.name for worker in deployment.workers] == ["prefill-0", "decode-0"]
    assert "2 of the plan's 5 workers" in deployment.notes[0]


def test_a_pool_may_have_blocks_of_its_own_size(tmp_path: Path) -> None:
    data = plan()
    data["pools"][1]["block_size"] = 32

    def blocks(*assignments: str) -> set[tuple[str, int, int | None]]:
        return {
            (each.settings.role, each.settings.engine.block_size, each.settings.engine.num_blocks)
            for each in opened(tmp_path, data, *assignments).workers
        }

    assert blocks() == {("prefill", 8, 500), ("decode", 32, 250)}
    assert blocks("decode.block_size=20") == {("prefill", 8, 500), ("decode", 20, 400)}
    assert blocks("block_size=40") == {("prefill", 40, 100), ("decode", 40, 200)}
    data["pools"][0]["block_size"] = 1025
    with pytest.raises(LocalFault, match=r"pools.0.block_size.*less than or equal to 1024"):
        blocks()


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5])
def test_scale_is_a_share(tmp_path: Path, scale: float) -> None:
    with pytest.raises(LocalFault, match="scale must be above 0 and at most 1"):
        opened(tmp_path, plan(), scale=scale)


def test_flags_win_over_the_plan(tmp_path: Path) -> None:
    deployment = opened(
        tmp_path, plan(), "decode.num_blocks=7", flags={"model": "demo-draft", "router.port": 0}
    )
    assert deployment.router.model == "demo-draft"
    assert deployment.router.port == 0
    assert {w.settings.engine.num_blocks for w in deployment.of_role(Role.DECODE)} == {7}
    assert {w.settings.engine.num_blocks for w in deployment.of_role(Role.PREFILL)} == {500}


def test_timed_engines_run_on_the_step_times_of_their_own_pool(tmp_path: Path) -> None:
    deployment = opened(tmp_path, plan(), flags={"engine": "timed"})
    for worker in deployment.workers:
        engine = worker.settings.engine
        assert engine.engine == "timed"
        assert engine.coefficients is not None
        is_reader = worker.settings.role == "prefill"
        assert engine.coefficients.fixed_s == (0.002 if is_reader else 0.001)


def test_timed_engines_need_step_times_of_every_pool(tmp_path: Path) -> None:
    data = plan(pools=[pool("prefill", 1), pool("decode", 1, step_times=STEP_TIMES)])
    with pytest.raises(LocalFault, match="needs step_times of every pool"):
        opened(tmp_path, data, flags={"engine": "timed"})


def test_workers_read_what_the_plan_has_for_their_pool(tmp_path: Path) -> None:
    mixed = [pool("prefill", 1), pool("decode", 1), pool("colocated", 2)]
    deployment = opened(tmp_path, plan(pools=mixed))
    reads = {worker.name: worker.settings.reads for worker in deployment.workers}
    assert reads == {
        "prefill-0": "others",
        "decode-0": "none",
        "decode-1": "own",
        "decode-2": "own",
    }
    for worker in deployment.of_role(Role.DECODE):
        assert worker.settings.max_local_prefill_tokens == 0


@pytest.mark.parametrize(("num_prefill", "reads"), [(1, "none"), (0, "own")])
def test_decode_workers_of_a_cluster_file_read_their_own_where_it_has_no_prefill_workers(
    tmp_path: Path, num_prefill: int, reads: str
) -> None:
    deployment = opened(tmp_path, {"prefill": {"replicas": num_prefill}})
    assert [worker.settings.reads for worker in deployment.of_role(Role.DECODE)] == [reads]


def test_gpus_of_the_catalogue_are_asked_for_by_rank(tmp_path: Path) -> None:
    data = plan(
        pools=[
            {**pool("prefill", 1), "gpu": "h100", "tp": 2, "pp": 2, "nodes": ["h100_sxm:0"]},
            {**pool("decode", 2), "gpu": "h200_sxm", "nodes": ["h200_sxm:0", "h200_sxm:1"]},
        ],
        cells=2,
    )
    deployment = opened(tmp_path, data)
    first, *_ = deployment.workers
    assert (first.gpu, first.num_gpus, first.gpus_per_node) == ("h100_sxm", 4, 8)
    assert first.settings.engine.device == "cuda"
    assert (first.settings.engine.tp, first.settings.engine.pp) == (2, 2)
    nodes = [worker.node for worker in deployment.of_role(Role.DECODE)]
    assert nodes == ["h200_sxm:0", "h200_sxm:1", "cell 1 h200_sxm:0", "cell 1 h200_sxm:1"]


def test_gpu_plan_on_the_cpu_says_that_its_prediction_does_not_hold(tmp_path: Path) -> None:
    data = plan(pools=[{**pool("prefill", 1), "gpu": "h100"}, {**pool("decode", 1), "gpu": "h100"}])
    deployment = opened(tmp_path, data, flags={"device": "cpu"})
    assert deployment.notes == ("the plan is for GPUs: its prediction does not hold on the CPU",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("decode.num_block=7", "decode.num_block: unknown field; did you mean num_blocks?"),
        ("decode.max_num_waiting=7", "decode.max_num_waiting: is called max_num_queued"),
        ("dtype=int4", "dtype: Input should be"),
        ("router.port=7451", "router: port and internal_port must differ"),
    ],
)
def test_bad_options_beside_a_plan_are_named_as_they_were_given(
    tmp_path: Path, given: str, said: str
) -> None:
    with pytest.raises(LocalFault) as caught:
        opened(tmp_path, plan(), given)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2 is not known here; this pdserve reads 1"),
        ({"pools": []}, "pools: "),
        ({"pools": [pool("prefill", 1)]}, "needs prefill and decode, or colocated"),
        ({"pools": [{**pool("colocated", 1), "gpu": "h101"}]}, "did you mean "),
        ({"pools": [{**pool("colocated", 1), "gpu": "my-chip"}]}, "--gpus-file"),
        ({"modle": "demo"}, "did you mean model?"),
        ({"slo": [{"name": "a\nb", "ttft_s": 1, "tpot_s": 1}]}, "slo.0.name: String should match"),
        (
            {"slo": [{"name": f"c{index}", "ttft_s": 1, "tpot_s": 1} for index in range(17)]},
            "slo: Tuple should have at most 16 items",
        ),
    ],
)
def test_bad_plans_are_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(LocalFault) as caught:
        opened(tmp_path, plan(**changes))
    assert said in caught.value.message


def test_own_gpu_types_come_from_their_file(tmp_path: Path) -> None:
    chip = {
        "name": "my-chip",
        "memory_gib": 64,
        "memory_gb_per_s": 2000,
        "bf16_tflops": 500,
        "tdp_w": 400,
        "gpus_per_node": 4,
        "intra_node_gb_per_s": 100,
        "inter_node_gb_per_s": 25,
    }
    gpus = tmp_path / "gpus.yaml"
    gpus.write_text(yaml.safe_dump({"gpus": [chip]}))
    data = plan(pools=[{**pool("colocated", 1), "gpu": "my-chip"}])
    deployment = opened(tmp_path, data, gpus_file=gpus)
    assert (deployment.workers[0].gpu, deployment.workers[0].gpus_per_node) == ("my-chip", 4)
