"""`pdserve check-links`: of plans and cluster files, and of clusters that serve."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.link_check.planned import measure_deployment
from deploy.link_check.running import measure_cluster
from deploy.opening import read_deployment
from pdserve.cli.main import build_app
from pdserve.client.faults import ClusterUnreachable
from pdserve.domain.errors import LocalFault
from tests.support.clusters import task_cluster, timed_engine
from tests.support.plans import plan, pool
from tests.support.up_runs import error_line, pdserve

SMALL = ("--size-mib", "1")


def plan_file(folder: Path, *pools: dict[str, Any], **changes: Any) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan(pools=list(pools), **changes)))
    return str(path)


def test_pools_of_a_plan_are_measured_pair_by_pair_without_its_model(tmp_path: Path) -> None:
    path = plan_file(
        tmp_path,
        pool("prefill", 2, kv_tokens=4000),
        pool("decode", 3, tp=2, kv_tokens=4000, block_size=12),
    )
    done = pdserve("check-links", path, *SMALL, "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0, said
    [link] = said["links"]
    assert (link["prefill"]["name"], link["decode"]["name"]) == (
        "prefill-0 to prefill-1",
        "decode-0 to decode-2",
    )
    assert (link["prefill"]["block_size"], link["decode"]["block_size"]) == (8, 12)
    assert (link["prefill"]["tp"], link["decode"]["tp"]) == (1, 2)
    assert (link["num_pairs"], link["transport"], link["verdict"]) == (6, "shm", "ok")
    assert link["num_bytes"] > 0
    assert link["bytes_per_s"] > 0
    assert link["latency_s"] > 0
    assert link["prefill"]["protocol_version"] == link["decode"]["protocol_version"]


def test_link_that_is_too_slow_or_damages_kv_is_told_and_fails(tmp_path: Path) -> None:
    path = plan_file(tmp_path, pool("prefill", 1), pool("decode", 1))
    slow = pdserve(
        "check-links", path, *SMALL, "--set", "transports=[tcp]", "--min-gib-per-s", "9e9"
    )
    assert slow.returncode == 1
    assert "less than --min-gib-per-s 9e+09" in slow.stdout.decode()
    wrong = pdserve("check-links", path, *SMALL, "--json", "--set", "decode.corrupt_kv_blocks=all")
    said = json.loads(wrong.stdout)
    assert (wrong.returncode, said["is_ok"]) == (1, False)
    assert "blocks did not match their digests" in said["links"][0]["verdict"]


def test_what_cannot_be_checked_is_a_clear_error(tmp_path: Path) -> None:
    colocated = plan_file(tmp_path, pool("colocated", 1))
    for arguments, why in (
        ((), "give one of these: a plan or cluster file, --address or --internal-address"),
        ((colocated, "--address", "127.0.0.1:1"), "give one of these"),
        (("-i", "127.0.0.1:1", "--set", "a=1"), "--size-mib and --set are for files"),
        (("--address", "127.0.0.1:1"), "started no cluster at 127.0.0.1:1 on this machine"),
        ((colocated,), "nothing hands KV on here"),
        ((str(tmp_path / "none.yaml"),), "none.yaml: no such file"),
    ):
        done = CliRunner().invoke(build_app(), ["check-links", *arguments])
        assert isinstance(done.exception, LocalFault)
        assert why in done.exception.message
    gone = CliRunner().invoke(build_app(), ["check-links", "--internal-address", "127.0.0.1:1"])
    assert isinstance(gone.exception, ClusterUnreachable)
    undivided = pdserve(
        "check-links", plan_file(tmp_path, pool("prefill", 1, tp=3), pool("decode", 1))
    )
    assert undivided.returncode == 2
    assert "prefill-0: tp 3, pp 1: 2 KV heads do not divide by tp 3" in error_line(undivided)


async def test_rank_that_ends_is_the_verdict_of_its_link(tmp_path: Path) -> None:
    path = plan_file(tmp_path, pool("prefill", 1), pool("decode", 1))
    deployment = read_deployment(Path(path), {}, (), pin=False)
    nowhere = deployment.workers[0].settings.model_copy(update={"cpus": (4095,)})
    broken = replace(
        deployment,
        workers=(replace(deployment.workers[0], settings=nowhere), *deployment.workers[1:]),
    )
    [link] = await measure_deployment(broken, 1 << 20)
    assert "prefill-0 rank 0 ended: OSError" in link.verdict(0.0)


async def test_pairs_of_a_cluster_that_serves_are_measured_by_handing_prompts_on() -> None:
    engines = [timed_engine(block_size=size) for size in (16, 24)]
    async with task_cluster(prefill=2, decode=1, engines=engines) as cluster:
        links = await measure_cluster(cluster.internal_address)
        state = await cluster.idle_state()
    assert [(link.prefill.name, link.decode.name) for link in links] == [
        ("prefill-0", "decode-0"),
        ("prefill-1", "decode-0"),
    ]
    for link in links:
        assert link.verdict(0.0) == ""
        assert (link.transport, link.num_bytes > 0) == ("shm", True)
        assert link.why
    assert state.num_completed == 0, "no router counts the tool's own requests"


async def test_pair_that_cannot_exchange_kv_is_told_with_the_reason() -> None:
    async with task_cluster(
        engine=timed_engine(),
        prefill_changes={"engine": timed_engine(dtype="bfloat16")},
    ) as cluster:
        [link] = await measure_cluster(cluster.internal_address)
        await cluster.idle_state()
    why = "KV dtype: float32 at the decode worker, bfloat16 at the prefill worker"
    assert link.verdict(0.0) == why


async def test_cluster_without_pairs_is_an_error() -> None:
    async with task_cluster(prefill=0, engine=timed_engine()) as cluster:
        with pytest.raises(LocalFault, match="it has 0 prefill workers"):
            await measure_cluster(cluster.internal_address)
