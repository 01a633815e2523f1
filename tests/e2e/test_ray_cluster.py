"""A plan on Ray: a test cluster of several nodes, with custom resources standing for GPUs."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deploy.backend import ClusterEvent
from deploy.deployment import Deployment
from deploy.local import LocalCluster
from deploy.opening import read_deployment
from pdserve.cli.problems import ClusterFailed
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Chunk, Sampling
from pdserve.domain.errors import LocalFault, PdserveError, Reason
from pdserve.domain.messages import ClusterState
from pdserve.domain.tokens import SampledToken
from tests.support.plans import plan, pool
from tests.support.prompts import demo_prompts
from tests.support.rank_plans import smoke, write_rank_plan
from tests.support.ray_clusters import GPU, RayNodes, ray_nodes
from tests.support.up_runs import Up, error_line, pdserve
from tests.support.waiting import wait_until

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

from deploy.ray.connecting import connect, disconnect  # noqa: E402
from deploy.ray.resources import RayOptions  # noqa: E402
from deploy.ray_cluster import RayCluster  # noqa: E402

SERVES_WITHIN_S = 60.0
BACK_WITHIN_S = 20.0
PATIENCE_S = 120.0  # a node that has just come starts Python and imports everything first
CLEAR_WITHIN_S = 3.0
OPTIONS = RayOptions(gpu_resources={"h100_sxm": {GPU: 1}})
STEPS = {"fixed_s": 0.02, "prefill_token_s": 1e-4, "decode_token_s": 0.001}
NODES = ["h100_sxm:0", "h100_sxm:1"]
PROMPT = tuple(range(20, 60))
LONG_ANSWER = Sampling(max_tokens=250, ignore_eos=True)  # takes five seconds to write


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[tuple[RayNodes, Any]]:
    """A head and one node with GPUs; this process is a driver of it."""
    with ray_nodes() as started:
        node = started.add(gpus=4)
        asyncio.run(connect(started.address))
        yield started, node
        disconnect()


@pytest.fixture
def nodes(ray_cluster: tuple[RayNodes, Any]) -> Iterator[RayNodes]:
    """That cluster; nodes that a test adds are gone after it."""
    started, node = ray_cluster
    yield started
    started.kill_all_but([node])


def plan_file(folder: Path, **changes: Any) -> Path:
    """Two prefill and two decode workers on GPUs, a pair of them on each of two nodes."""
    pools = [
        pool(role, 2, gpu="h100_sxm", nodes=NODES, kv_tokens=16384, step_times=STEPS)
        for role in ("prefill", "decode")
    ]
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan(**{"pools": pools, "block_size": 16, **changes})))
    return path


def planned(folder: Path, engine: str = "timed", **changes: Any) -> Deployment:
    flags = {"engine": engine, "device": "cpu", "dtype": "float32"}
    ports = {"router.port": 0, "router.internal_port": 0}
    return read_deployment(plan_file(folder, **changes), {**flags, **ports}, [])


class Events:
    """All that a running cluster told, gathered while it runs."""

    def __init__(self) -> None:
        self.told: list[ClusterEvent] = []

    def has(self, *parts: str) -> bool:
        return any(all(part in event.message for part in parts) for event in self.told)

    async def gather(self, cluster: RayCluster) -> None:
        while True:
            self.told.append(await cluster.next_event())


@contextlib.asynccontextmanager
async def running(
    deployment: Deployment, options: RayOptions = OPTIONS
) -> AsyncIterator[tuple[RayCluster, InferenceClient, Events]]:
    async with RayCluster.start(deployment, options=options) as cluster:
        events = Events()
        gathering = asyncio.create_task(events.gather(cluster))
        try:
            async with InferenceClient(cluster.public_address) as client:
                yield cluster, client, events
        finally:
            gathering.cancel()


def pids(cluster: RayCluster | LocalCluster) -> dict[str, int]:
    return {row.name: row.pid for row in cluster.rows}


def places(cluster: RayCluster) -> dict[str, str]:
    return {row.name: row.place for row in cluster.rows}


async def state_of(cluster: RayCluster | LocalCluster) -> ClusterState:
    async with AdminClient(cluster.internal_address) as admin:
        return await admin.cluster_state()


async def back(cluster: RayCluster, names: set[str], before: dict[str, int]) -> float:
    """How long until the router has new lives of `names`, all alive."""
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE_S:
        with contextlib.suppress(PdserveError):
            state = await state_of(cluster)
            now = pids(cluster)
            serving = {
                str(worker.hello.worker_id)
                for worker in state.workers
                if worker.health == "alive"
                and worker.hello.pid == now[worker.hello.worker_id]
                and worker.hello.pid != before[worker.hello.worker_id]
            }
            if names <= serving:
                return time.monotonic() - started
        await asyncio.sleep(0.05)
    raise AssertionError(f"not back: {names}")


def leftovers() -> list[str]:
    """What of pdserve is still in the Ray cluster."""
    actors = [
        f"actor {actor['ActorClassName']}"
        for actor in ray._private.state.actors().values()
        if actor["State"] != "DEAD"
    ]
    groups = [
        f"placement group {group['name']}"
        for group in ray.util.placement_group_table().values()
        if group["state"] != "REMOVED"
    ]
    return actors + groups


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


class Traces:
    """What a cluster has outside of this process, to be looked for when it is gone."""

    def __init__(self) -> None:
        self._shared_memory = set(os.listdir("/dev/shm"))
        self._pids: set[int] = set()
        self._addresses: set[str] = set()

    def note(self, cluster: RayCluster) -> None:
        self._pids |= {row.pid for row in cluster.rows}
        self._addresses |= {row.address for row in cluster.rows} | {cluster.public_address}
        self._addresses |= {row.metrics_address for row in cluster.rows}

    async def all_gone(self) -> None:
        """Ray's own tables lag by a moment, so they are looked at again; nothing else may."""
        assert not [pid for pid in self._pids if psutil.pid_exists(pid)]
        assert not [address for address in self._addresses if is_listening(address)]
        assert set(os.listdir("/dev/shm")) <= self._shared_memory
        await wait_until(lambda: not leftovers(), within_s=5, what="actors and groups are gone")


async def tokens_of(cluster: RayCluster | LocalCluster) -> list[tuple[int, ...]]:
    """Answers to 50 prompts, a few at a time."""
    async with InferenceClient(cluster.public_address) as client:
        slots = asyncio.Semaphore(6)

        async def ask(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
            async with slots:
                sampling = Sampling(max_tokens=max_tokens, temperature=0.8, seed=7)
                answer = await client.complete(prompt, sampling, timeout_s=60)
                return tuple(token.token_id for token in answer.tokens)

        prompts = demo_prompts(50, seed=4, max_new_tokens=12)
        return list(await asyncio.gather(*(ask(*each) for each in prompts)))


def alike(state: ClusterState) -> dict[str, tuple[object, ...]]:
    """What `pdserve status` shows of a cluster apart from addresses, processes and times."""
    return {
        str(worker.hello.worker_id): (
            worker.hello.role,
            worker.hello.model_name,
            worker.hello.model_hash,
            worker.hello.layout,
            worker.hello.num_blocks,
            worker.hello.block_size,
            worker.hello.max_num_requests,
            worker.hello.max_step_tokens,
            worker.hello.engine,
            worker.health,
            worker.load.kv.is_idle,
            worker.load.kv.total,
        )
        for worker in state.workers
    }


async def idle_state(cluster: RayCluster | LocalCluster) -> ClusterState:
    """Workers report with their heartbeats, so the state lags behind the last answer."""
    deadline = time.monotonic() + 5
    while True:
        state = await state_of(cluster)
        if all(worker.load.kv.is_idle for worker in state.workers) or time.monotonic() > deadline:
            return state
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("engine", ["timed", "torch"])
async def test_a_plan_gives_the_same_tokens_and_status_on_ray_as_locally_and_leaves_nothing(
    nodes: RayNodes, tmp_path: Path, engine: str
) -> None:
    deployment = planned(tmp_path, engine)
    async with LocalCluster.start(deployment) as local:
        expected = await tokens_of(local)
        local_state = await idle_state(local)
    nodes.add(gpus=4)
    traces = Traces()
    async with running(deployment) as (cluster, _, events):
        traces.note(cluster)
        assert await tokens_of(cluster) == expected
        state = await idle_state(cluster)
        where = places(cluster)
    assert alike(state) == alike(local_state)
    assert state.num_completed == local_state.num_completed == 50
    assert sum(len(tokens) for tokens in expected) > 200
    assert where["prefill-0"] == where["decode-0"] != where["prefill-1"] == where["decode-1"]
    assert events.has("warning: insecure")
    await traces.all_gone()


async def long_answers(client: InferenceClient, count: int) -> list["LongAnswer"]:
    """Requests that are being answered, all of them."""
    answers = [LongAnswer(client) for _ in range(count)]
    await wait_until(
        lambda: all(answer.num_tokens > 3 for answer in answers), within_s=20, what="tokens come"
    )
    return answers


class LongAnswer:
    def __init__(self, client: InferenceClient) -> None:
        self.chunks: list[Chunk] = []
        self.failure: PdserveError | None = None
        self.ended_s = 0.0
        self._task = asyncio.create_task(self._read(client))

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token.token_id for chunk in self.chunks for token in chunk.tokens)

    async def end(self) -> None:
        async with asyncio.timeout(40):
            await self._task

    async def _read(self, client: InferenceClient) -> None:
        try:
            async for chunk in client.generate(PROMPT, LONG_ANSWER, timeout_s=60):
                self.chunks.append(chunk)
        except PdserveError as error:
            self.failure = error
        self.ended_s = time.monotonic()


async def assigned(cluster: RayCluster) -> dict[str, int]:
    state = await state_of(cluster)
    return {str(worker.hello.worker_id): worker.num_assigned for worker in state.workers}


async def check_answers(answers: list[LongAnswer], num_lost: int, lost_s: float) -> None:
    """Those on what was lost ended soon and clearly; all others are whole."""
    for answer in answers:
        await answer.end()
    failed = [answer for answer in answers if answer.failure is not None]
    whole = [answer for answer in answers if answer.failure is None]
    assert len(failed) == num_lost
    for answer in failed:
        assert answer.failure is not None
        assert answer.failure.reason is Reason.STREAM_INTERRUPTED
        assert answer.ended_s - lost_s < CLEAR_WITHIN_S
    assert {len(answer.tokens) for answer in whole} == {LONG_ANSWER.max_tokens}
    assert len({answer.tokens for answer in whole}) == 1
    for answer in failed:
        assert answer.tokens == whole[0].tokens[: len(answer.tokens)]


async def test_a_killed_actors_worker_is_back_and_only_its_requests_end(
    nodes: RayNodes, tmp_path: Path
) -> None:
    async with running(planned(tmp_path)) as (cluster, client, events):
        answers = await long_answers(client, 6)
        before, num_lost = pids(cluster), (await assigned(cluster))["decode-0"]
        assert 0 < num_lost < 6
        (actor,) = [
            parent
            for parent in psutil.Process(before["decode-0"]).parents()
            if "RankActor" in parent.name() or "RankActor" in " ".join(parent.cmdline())
        ]
        killed_s = time.monotonic()
        actor.kill()
        assert await back(cluster, {"decode-0"}, before) < BACK_WITHIN_S
        await check_answers(answers, num_lost, killed_s)
        assert not psutil.pid_exists(before["decode-0"])
        assert {name for name, pid in pids(cluster).items() if pid != before[name]} == {"decode-0"}
        assert events.has("decode-0", "serves again")
        assert len((await client.complete(PROMPT, Sampling(max_tokens=4))).tokens) == 4


async def test_a_killed_nodes_workers_are_back_on_another_and_only_its_requests_end(
    nodes: RayNodes, tmp_path: Path
) -> None:
    victim = nodes.add(gpus=2)
    traces = Traces()
    async with running(planned(tmp_path)) as (cluster, client, events):
        traces.note(cluster)
        on_it = {name for name, place in places(cluster).items() if victim.node_id[:6] in place}
        assert {name.partition("-")[0] for name in on_it} == {"prefill", "decode"}
        answers = await long_answers(client, 6)
        counts = await assigned(cluster)
        num_lost = sum(counts[name] for name in on_it if name.startswith("decode"))
        before, killed_s = pids(cluster), time.monotonic()
        nodes.kill(victim)
        assert await back(cluster, on_it, before) < BACK_WITHIN_S
        await check_answers(answers, num_lost, killed_s)
        (left,) = {place for name, place in places(cluster).items() if name != "router"}
        # What is heard of first differs: node, actor, or the process that died with them.
        for name in on_it:
            assert events.has(name, "starting it again")
            assert events.has(name, f"serves again on {left}")
        traces.note(cluster)
    await traces.all_gone()


async def test_the_demo_model_serves_soon_and_is_back_soon_after_its_node_was_killed(
    nodes: RayNodes, tmp_path: Path
) -> None:
    victim = nodes.add(gpus=2)
    started = time.monotonic()
    async with running(planned(tmp_path, "torch")) as (cluster, client, _):
        expected = (await client.complete(PROMPT, Sampling(max_tokens=20))).tokens
        assert time.monotonic() - started < SERVES_WITHIN_S
        on_it = {name for name, place in places(cluster).items() if victim.node_id[:6] in place}
        before, endings = pids(cluster), Counter[str]()
        asking = asyncio.create_task(keep_asking(client, expected, endings))
        await wait_until(lambda: endings["whole"] > 3, within_s=20, what="requests are answered")
        nodes.kill(victim)
        assert await back(cluster, on_it, before) < BACK_WITHIN_S
        num_whole = endings["whole"]
        await wait_until(lambda: endings["whole"] > num_whole + 9, within_s=20, what="it serves")
        asking.cancel()
        assert set(endings) <= {"whole", Reason.STREAM_INTERRUPTED}
        assert endings[Reason.STREAM_INTERRUPTED] <= 1  # one at a time
        assert not [name for name in on_it if psutil.pid_exists(before[name])]


async def keep_asking(
    client: InferenceClient, expected: tuple[SampledToken, ...], endings: Counter[str]
) -> None:
    """Ask the same again and again, one at a time; count how it ended."""
    while True:
        try:
            answer = await client.complete(
                PROMPT, Sampling(max_tokens=20), timeout_s=CLEAR_WITHIN_S
            )
            endings["whole" if answer.tokens == expected else "other tokens"] += 1
        except PdserveError as error:
            endings[error.reason] += 1


async def test_a_stopped_worker_is_replaced_and_never_wakes_up(
    nodes: RayNodes, tmp_path: Path
) -> None:
    async with running(planned(tmp_path)) as (cluster, client, events):
        before = pids(cluster)
        os.kill(before["prefill-1"], signal.SIGSTOP)
        # The router waits `dead_s` before it gives a silent worker up.
        assert await back(cluster, {"prefill-1"}, before) < BACK_WITHIN_S
        assert not psutil.pid_exists(before["prefill-1"])
        assert events.has("prefill-1", "was silent") or events.has("prefill-1", "is silent")
        assert len((await client.complete(PROMPT, Sampling(max_tokens=4))).tokens) == 4


async def test_a_killed_router_is_back_at_its_address_with_all_workers(
    nodes: RayNodes, tmp_path: Path
) -> None:
    async with running(planned(tmp_path)) as (cluster, client, _):
        before = pids(cluster)
        os.kill(before["router"], signal.SIGKILL)
        await wait_until(
            lambda: cluster.num_serving == 5 and pids(cluster)["router"] != before["router"],
            within_s=BACK_WITHIN_S,
            what="the router is back",
        )
        names = {name for name in before if name != "router"}
        async with asyncio.timeout(BACK_WITHIN_S):
            while names - (await assigned(cluster)).keys():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert len((await client.complete(PROMPT, Sampling(max_tokens=4))).tokens) == 4
        now = pids(cluster)
        assert {name for name in before if now[name] != before[name]} == {"router"}


async def test_without_room_a_lost_worker_waits_and_comes_back_with_a_new_node(
    nodes: RayNodes, tmp_path: Path
) -> None:
    victim = nodes.add(gpus=4)
    options = replace(OPTIONS, gpu_resources={"h100_sxm": {GPU: 2}})
    async with running(planned(tmp_path), options) as (cluster, client, events):
        on_it = {name for name, place in places(cluster).items() if victim.node_id[:6] in place}
        before = pids(cluster)
        nodes.kill(victim)
        await wait_until(
            lambda: events.has("waits", "room for it"), within_s=20, what="it says that it waits"
        )
        assert "waits for a node" in places(cluster).values()
        assert len((await client.complete(PROMPT, Sampling(max_tokens=4))).tokens) == 4
        nodes.add(gpus=4)
        await back(cluster, on_it, before)


async def test_a_node_that_dies_while_starting_takes_all_down_with_a_clear_message(
    nodes: RayNodes, tmp_path: Path
) -> None:
    victim = nodes.add(gpus=2)
    traces = Traces()
    steps: list[str] = []

    def report(text: str) -> None:
        steps.append(text)
        if text.startswith("starting prefill-0"):
            nodes.kill_and_wait(victim)  # else all may serve before Ray knows

    cluster = RayCluster.start(planned(tmp_path, "torch"), options=OPTIONS, report=report)
    with pytest.raises(ClusterFailed, match=r"actor|node"):
        async with asyncio.timeout(SERVES_WITHIN_S), cluster:
            pass
    assert any(text.startswith("starting prefill-0") for text in steps)
    await traces.all_gone()
    children = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"prefill_worker", "decode_worker"} & set(process.info["cmdline"] or ())
        and psutil.Process().pid in {parent.pid for parent in process.parents()}
    ]
    assert not children


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, RayOptions(gpu_resources={"h100_sxm": {GPU: 3}}), "3 big_gpu"),
        ({}, RayOptions(gpu_resources={"h100_sxm": {"huge_gpu": 1}}), "no node of the Ray cluster"),
    ],
)
async def test_too_few_resources_are_told_before_anything_starts(
    nodes: RayNodes, tmp_path: Path, changes: Any, options: RayOptions, said: str
) -> None:
    with pytest.raises(LocalFault) as caught:
        await RayCluster.start(planned(tmp_path, **changes), options=options).__aenter__()
    message = caught.value.message
    assert said in message
    assert "workers that would fit: " in message
    assert not leftovers()


async def test_a_plan_for_gpus_that_are_not_there_says_what_is(
    nodes: RayNodes, tmp_path: Path
) -> None:
    deployment = read_deployment(plan_file(tmp_path), {"device": "cuda"}, [])
    with pytest.raises(LocalFault) as caught:
        await RayCluster.start(deployment).__aenter__()
    message = caught.value.message
    assert "no node of the Ray cluster has GPU or accelerator_type:H100 (the plan's h100" in message
    assert f"4 {GPU}" in message
    assert "--ray-resource" in message


def pools_of_two_ranks() -> list[dict[str, Any]]:
    return [
        pool(role, 1, gpu="h100_sxm", tp=2, kv_tokens=16384, step_times=STEPS)
        for role in ("prefill", "decode")
    ]


async def test_ranks_of_a_worker_are_actors_on_one_node_and_end_together(
    nodes: RayNodes, tmp_path: Path
) -> None:
    deployment = planned(tmp_path, pools=pools_of_two_ranks())
    async with running(deployment) as (cluster, client, events):
        assert [row.num_ranks for row in cluster.rows] == [1, 2, 2]
        groups = ray.util.placement_group_table().values()
        bundles = [group["bundles"] for group in groups if group["state"] == "CREATED"]
        assert [len(each) for each in bundles] == [2, 2]
        assert all(bundle[GPU] == 1 for each in bundles for bundle in each.values())
        assert len((await client.complete(PROMPT, Sampling(max_tokens=4))).tokens) == 4
        hosted = cluster.slot("decode-0").hosted
        assert hosted is not None
        before, (first, second) = pids(cluster), hosted.pids
        os.kill(second, signal.SIGKILL)
        await wait_until(lambda: not psutil.pid_exists(first), within_s=3, what="rank 0 is gone")
        await back(cluster, {"decode-0"}, before)
        assert events.has("decode-0", "rank 1", "SIGKILL", "starting it again")
        assert (cluster.log_dir / "decode-0.rank1.log").exists()
        assert len((await client.complete(PROMPT, Sampling(max_tokens=4))).tokens) == 4
    await wait_until(lambda: not leftovers(), within_s=5, what="actors and groups are gone")


async def test_a_plan_of_tp_and_pp_serves_on_two_nodes(nodes: RayNodes, tmp_path: Path) -> None:
    nodes.add(gpus=2)
    path = write_rank_plan(tmp_path, gpu="h100_sxm", nodes=([NODES[0]], [NODES[1]]))
    flags = {"device": "cpu", "dtype": "float32", "router.port": 0, "router.internal_port": 0}
    deployment = read_deployment(path, flags, ["start_s=300"])
    async with running(deployment) as (cluster, _, _):
        where = places(cluster)
        assert where["prefill-0"] != where["decode-0"]
        assert [row.num_ranks for row in cluster.rows] == [1, 2, 2]
        assert await smoke(cluster) == ""
    await wait_until(lambda: not leftovers(), within_s=5, what="actors and groups are gone")


async def test_each_rank_sees_the_gpu_that_ray_gave_it(nodes: RayNodes, tmp_path: Path) -> None:
    nodes.add(gpus=0, cuda_gpus=4)
    options = RayOptions(gpu_resources={"h100_sxm": {"GPU": 1}})
    deployment = planned(tmp_path, pools=pools_of_two_ranks())
    async with RayCluster.start(deployment, options=options) as cluster:
        seen = []
        for name in ("prefill-0", "decode-0"):
            hosted = cluster.slot(name).hosted
            assert hosted is not None
            seen += [psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in hosted.pids]
        assert sorted(seen) == ["0", "1", "2", "3"]
        shown = [row.device for row in cluster.rows if row.device]
        assert sorted(",".join(each.removeprefix("GPU ") for each in shown).split(",")) == sorted(
            seen
        )


def test_up_and_down_on_ray_as_a_person_runs_them(nodes: RayNodes, tmp_path: Path) -> None:
    """`down` finds the cluster through Ray: there is no run file that it could read."""
    on_ray = (
        "--backend",
        "ray",
        "--ray-address",
        nodes.address,
        "--ray-resource",
        f"h100_sxm={GPU}",
    )
    ports = ("--port", "0", "--internal-port", "0")
    options = ("--engine", "timed", "--device", "cpu", "--log-dir", str(tmp_path / "logs"))
    own = {"XDG_RUNTIME_DIR": str(tmp_path)}
    run = Up(str(plan_file(tmp_path)), *on_ray, *ports, *options, env=own)
    try:
        assert run.said["ready"], run.said
        assert {each["place"] != "" for each in run.said["processes"]} == {True}
        done = pdserve("smoke", "--json", cluster=run)
        assert done.returncode == 0, done.stdout
        (tmp_path / "other").mkdir()
        elsewhere = {"XDG_RUNTIME_DIR": str(tmp_path / "other")}
        down = ("down", "--backend", "ray", "--ray-address", nodes.address)
        done = pdserve(*down, env=elsewhere)
        assert done.returncode == 0, done.stderr
        assert run.said["address"] in done.stdout.decode()
        code, errors = run.wait()
        assert code == 0, errors
        assert "asked to stop" in errors
        assert "warning: insecure" in errors
        assert "worker.drained" in (tmp_path / "logs" / "decode-0.log").read_text()
        assert not [each for each in run.said["processes"] if psutil.pid_exists(each["pid"])]
        again = pdserve(*down, env=elsewhere)
        assert again.returncode == 1
        assert "no cluster of pdserve is up on the Ray cluster" in error_line(again)
    finally:
        run.kill_all()


async def test_an_up_that_is_killed_leaves_nothing_on_ray(nodes: RayNodes, tmp_path: Path) -> None:
    on_ray = (
        "--backend",
        "ray",
        "--ray-address",
        nodes.address,
        "--ray-resource",
        f"h100_sxm={GPU}",
    )
    options = ("--engine", "timed", "--device", "cpu", "--port", "0", "--internal-port", "0")
    own = {"XDG_RUNTIME_DIR": str(tmp_path)}
    run = Up(str(plan_file(tmp_path)), *on_ray, *options, env=own)
    try:
        serving = [each["pid"] for each in run.said["processes"]]
        assert leftovers()
        run.child.kill()
        await wait_until(
            lambda: not leftovers() and not any(map(psutil.pid_exists, serving)),
            within_s=BACK_WITHIN_S,
            what="actors, groups and processes are gone",
        )
    finally:
        run.kill_all()


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("127.0.0.1:1", 1, "no Ray cluster answers at"),
        ("ray://10.0.0.1:10001", 2, "expected host:port of the Ray head"),
        ("nowhere", 2, "expected host:port of the Ray head"),
    ],
)
def test_no_ray_cluster_at_the_address(address: str, code: int, said: str) -> None:
    done = pdserve("up", "--backend", "ray", "--ray-address", address)
    assert done.returncode == code
    assert said in error_line(done)
