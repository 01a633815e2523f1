"""Pods of workers of many ranks, run: one pod of 8 ranks, and two pods that share 16.

The rendered commands, settings and names are the pods' own; only what they compute with is laid
over, since there are no GPUs here.
"""

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from tests.support.kubelet import Kubelet, PodPlan, pod_plans
from tests.support.kubernetes_manifests import build, needs_kubectl, render
from tests.support.plans import plan, pool
from tests.support.pods import Pod, why_no_pods
from tests.support.tiny_models import save_tiny_model

pytestmark = [
    needs_kubectl,
    pytest.mark.skipif(bool(why_no_pods()), reason=f"no namespaces here: {why_no_pods()}"),
]

START_S = 120.0
GONE_S = 3.0
STEPS = {"fixed_s": 0.002, "prefill_token_s": 1e-6, "decode_token_s": 1e-5}
TIMED = ("engine=timed", "device=cpu", f"coefficients={json.dumps(STEPS)}")
ON_CPUS = ("engine=torch", "device=cpu")


@contextlib.contextmanager
def running_pods(folder: Path) -> Iterator[Kubelet]:
    """Nodes and pods of a prefill worker of TP 8 and a decode worker of TP 16, none created yet."""
    sizes = {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 16}
    pools = [
        pool("prefill", 1, gpu="h100_sxm", tp=8, kv_tokens=16384),
        pool("decode", 1, gpu="h100_sxm", tp=16, kv_tokens=16384),
    ]
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan(pools=pools, block_size=16)))
    # Each pod has a /tmp of its own.
    with tempfile.TemporaryDirectory(prefix="pdserve-model-", dir="/var/tmp") as model:
        save_tiny_model("llama", Path(model), **sizes)
        render(path, folder / "rendered", "--model", model, "--set", "dtype=float32")
        objects = build(folder / "rendered" / "overlays" / "dev")
        smoke = build(folder / "rendered" / "smoke")
        with Kubelet([*objects, *smoke], folder) as running:
            yield running


@pytest.fixture(scope="module")
def kubelet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    with running_pods(tmp_path_factory.mktemp("rank-pods")) as running:
        yield running


def plans_of(kubelet: Kubelet) -> Mapping[str, PodPlan]:
    return {each.name: each for each in pod_plans(kubelet.objects)}


def start(kubelet: Kubelet, planned: PodPlan, pod: Pod, engine: Sequence[str]) -> None:
    """Run the pod's own command, on what is here instead of GPUs."""
    words, env = kubelet.command_of(planned, pod)
    if planned.container["name"] != "router":
        for each in engine:
            words += ["--set", f"engine.{each}"]
    pod.start(words, env)


def smoke(
    kubelet: Kubelet, engine: Sequence[str], start_s: float = START_S
) -> tuple[int | None, str]:
    """Start all pods and run the smoke job once they are ready: its exit code and its words."""
    plans = plans_of(kubelet)
    (client,) = [name for name in plans if "smoke" in name]
    servers = [name for name in plans if name != client]
    # The leader comes last: the others of its group may start before it has an address.
    for name in sorted(servers, reverse=True):
        start(kubelet, plans[name], kubelet.create(plans[name]), engine)
    for name in servers:
        if "readinessProbe" in plans[name].container:
            kubelet.wait_until(name, "readinessProbe", passes=True, within_s=start_s)
    pod = kubelet.create(plans[client])
    return pod.ask(*kubelet.command_of(plans[client], pod))


def wait_for_end(pod: Pod, within_s: float) -> float:
    """Seconds until the pod's process has ended."""
    assert pod.process is not None
    started_s = time.monotonic()
    pod.process.wait(timeout=within_s)
    return time.monotonic() - started_s


def test_pods_are_one_for_8_ranks_and_a_group_of_two_for_16(kubelet: Kubelet) -> None:
    workers = {name: each for name, each in plans_of(kubelet).items() if "prefill" in name}
    assert list(workers) == ["pdserve-prefill-0"]
    decode = [name for name in plans_of(kubelet) if "decode" in name]
    assert decode == ["pdserve-decode-0", "pdserve-decode-0-1"]


def test_both_workers_serve_the_smoke_job(kubelet: Kubelet) -> None:
    code, said = smoke(kubelet, TIMED)
    assert code == 0, said
    assert '"ready": true' in kubelet.pods["pdserve-decode-0-1"].log_path.read_text()


def test_a_pod_that_is_told_to_end_has_its_whole_worker_drain(kubelet: Kubelet) -> None:
    follower, leader = (kubelet.pods[f"pdserve-decode-0{suffix}"] for suffix in ("-1", ""))
    assert follower.process is not None
    assert leader.process is not None
    follower.process.send_signal(signal.SIGTERM)
    wait_for_end(leader, within_s=30)
    wait_for_end(follower, within_s=GONE_S)
    assert (leader.process.returncode, follower.process.returncode) == (0, 0)
    assert "worker.drained" in leader.log_path.read_text()


def test_the_loss_of_one_pod_ends_the_others_of_its_group(kubelet: Kubelet) -> None:
    """The set's controller makes the whole group anew where one pod of it ends."""
    plans = plans_of(kubelet)
    pods = []
    for name in ("pdserve-decode-0", "pdserve-decode-0-1"):
        pod = kubelet.pods[name]
        start(kubelet, plans[name], pod, TIMED)
        pods.append(pod)
    kubelet.wait_until("pdserve-decode-0", "readinessProbe", passes=True, within_s=START_S)
    leader, follower = pods
    assert follower.process is not None
    os.kill(follower.process.pid, signal.SIGKILL)
    assert wait_for_end(leader, within_s=10) < GONE_S
    assert leader.process is not None
    assert leader.process.returncode != 0
    assert "rank 8" in leader.log_path.read_text()


@pytest.mark.slow
def test_both_workers_of_the_real_engine_serve_the_smoke_job(tmp_path: Path) -> None:
    """24 processes of torch: a minute of two cores."""
    with running_pods(tmp_path) as kubelet:
        code, said = smoke(kubelet, ON_CPUS, 5 * START_S)
        assert code == 0, said
