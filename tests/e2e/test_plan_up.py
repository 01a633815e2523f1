"""`pdserve up plan.yaml`, `smoke` and `down`, with real processes."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from tests.support.plans import STEP_TIMES, plan, pool
from tests.support.up_runs import Up, error_line, pdserve

GOLDEN_PLANS = Path(__file__).parents[1] / "golden" / "kubernetes" / "plans"
PORTS = ("--port", "0", "--internal-port", "0")


@pytest.fixture
def own_runs(tmp_path: Path) -> dict[str, str]:
    """Run files of its own: `down` then sees only this test's clusters."""
    return {"XDG_RUNTIME_DIR": str(tmp_path)}


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan()))
    return path


@pytest.fixture
def planned(plan_file: Path, own_runs: dict[str, str]) -> Iterator[Up]:
    run = Up(str(plan_file), "--engine", "timed", "--scale", "0.4", *PORTS, env=own_runs)
    try:
        yield run
    finally:
        run.kill_all()


def status_of(cluster: Up) -> dict[str, Any]:
    status = json.loads(pdserve("status", "--json", cluster=cluster).stdout)
    assert isinstance(status, dict)
    return status


def test_a_plan_is_started_with_its_limits_smoked_and_taken_down(
    planned: Up, own_runs: dict[str, str]
) -> None:
    names = [each["name"] for each in planned.said["processes"]]
    assert names == ["router", "prefill-0", "decode-0"]  # 0.4 of 2 and of 3
    assert all(each["metrics_address"] for each in planned.said["processes"])
    hellos = [worker["hello"] for worker in status_of(planned)["workers"]]
    assert {hello["max_step_tokens"] for hello in hellos} == {256}
    assert {hello["max_num_requests"] for hello in hellos} == {12}
    assert {hello["block_size"] for hello in hellos} == {8}
    cores = [set(psutil.Process(planned.pid_of(name)).cpu_affinity()) for name in names[1:]]
    if psutil.cpu_count() and len(psutil.Process().cpu_affinity()) >= 2:
        assert not cores[0] & cores[1], "reading and decoding share a core"

    internal = planned.said["internal_address"]
    done = pdserve("smoke", "--json", "--internal-address", internal, cluster=planned)
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    seen = {check["check"]: check["seen"] for check in report["checks"]}
    assert "read by prefill-0, its KV handed over" in seen["a long prompt"]
    assert seen["workers' books"].startswith("1 prefill and 1 decode workers alive")

    done = pdserve("down", "--json", env=own_runs)
    assert done.returncode == 0, done.stderr
    assert [run["address"] for run in json.loads(done.stdout)] == [planned.said["address"]]
    code, errors = planned.wait()
    assert (code, planned.left()) == (0, []), errors
    assert "note: scaled to 0.4: 2 of the plan's 5 workers" in errors
    done = pdserve("down", env=own_runs)
    assert done.returncode == 1
    assert "no cluster of this user is up" in error_line(done)


def test_a_mixed_plan_keeps_its_roles(tmp_path: Path, own_runs: dict[str, str]) -> None:
    times = {"kv_tokens": 8000, "step_times": STEP_TIMES}
    pools = [pool(role, 1, **times) for role in ("prefill", "decode", "colocated")]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan(pools=pools)))
    run = Up(str(path), "--engine", "timed", *PORTS, env=own_runs)
    try:
        hellos = [worker["hello"] for worker in status_of(run)["workers"]]
        assert {hello["worker_id"]: hello["reads"] for hello in hellos} == {
            "prefill-0": "others",
            "decode-0": "none",
            "decode-1": "own",
        }
        pairs = asyncio.run(pairs_of(run.said["address"], num=30))
        assert set(pairs) == {("prefill-0", "decode-0"), ("", "decode-1")}
        done = pdserve("smoke", "--json", cluster=run)
        assert done.returncode == 0, done.stdout
    finally:
        run.kill_all()


def test_a_plan_with_two_pools_of_one_role_and_a_hundred_workers_serves(
    tmp_path: Path, own_runs: dict[str, str]
) -> None:
    pools = [
        pool("prefill", 30, kv_tokens=8000, step_times=STEP_TIMES),
        pool("prefill", 3, kv_tokens=4000, step_times=STEP_TIMES),
        pool("decode", 67, kv_tokens=8000, step_times=STEP_TIMES),
    ]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan(pools=pools)))
    run = Up(str(path), "--engine", "timed", *PORTS, env=own_runs)
    try:
        hellos = [worker["hello"] for worker in status_of(run)["workers"]]
        sizes = {hello["worker_id"]: hello["num_blocks"] for hello in hellos}
        assert len(sizes) == 100
        assert [sizes[f"prefill-{index}"] for index in (0, 29, 30, 32)] == [1000, 1000, 500, 500]
        pairs = asyncio.run(pairs_of(run.said["address"], num=40))
        assert len({reader for reader, _ in pairs}) > 1
        assert len({writer for _, writer in pairs}) > 1
    finally:
        run.kill_all()


@pytest.mark.parametrize("path", sorted(GOLDEN_PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_plan_that_is_rendered_comes_up_here_too(
    path: Path, own_runs: dict[str, str]
) -> None:
    here = ("--engine", "timed", "--model", "demo", "--device", "cpu", "--scale", "0.1")
    times = ("--set", f"coefficients={json.dumps(STEP_TIMES)}")
    run = Up(str(path), *here, *times, *PORTS, env=own_runs)
    try:
        done = pdserve("smoke", "--json", cluster=run)
        assert done.returncode == 0, done.stdout
    finally:
        run.kill_all()


async def pairs_of(address: str, *, num: int) -> list[tuple[str, str]]:
    """Who read and who wrote, of requests that are sent side by side."""
    async with InferenceClient(address) as client:

        async def ask(number: int) -> tuple[str, str]:
            prompt = tuple(range(10 + number, 110 + number))
            answer = await client.complete(prompt, Sampling(max_tokens=8))
            timeline = answer.finished.timeline
            return timeline.prefill_worker, timeline.decode_worker

        return await asyncio.gather(*map(ask, range(num)))


def test_smoke_fails_on_a_cluster_that_cannot_hand_kv_over(
    plan_file: Path, own_runs: dict[str, str]
) -> None:
    drill = ("--set", "decode.corrupt_kv_blocks=all")
    run = Up(str(plan_file), "--engine", "timed", "--scale", "0.1", *drill, *PORTS, env=own_runs)
    try:
        done = pdserve("smoke", "--json", cluster=run)
        report = json.loads(done.stdout)
        assert done.returncode == 1
        assert not report["ok"]
        failed = [check["check"] for check in report["checks"] if not check["is_ok"]]
        assert "a long prompt" in failed
        assert "a request that cannot be" not in failed
    finally:
        run.kill_all()


def test_a_plan_for_gpus_that_are_not_here_says_what_to_do(tmp_path: Path) -> None:
    pools = [
        {"role": "prefill", "gpu": "h100_sxm", "tp": 4, "replicas": 30},
        {"role": "decode", "gpu": "h100_sxm", "tp": 4, "replicas": 30},
    ]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan(pools=pools)))
    done = pdserve("up", str(path), *PORTS)
    assert done.returncode == 2
    assert "the workers need 240 GPUs (h100_sxm); this machine has" in error_line(done)
    assert "--device cpu" in error_line(done)


def test_smoke_without_a_cluster_says_so() -> None:
    done = pdserve("smoke", "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert "is the cluster up?" in error_line(done)
