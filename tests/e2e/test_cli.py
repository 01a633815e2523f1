"""`pdserve` as a person runs it: real processes, an engine that computes nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pdserve.models import DEMO_MODEL_DIR
from tests.support.up_runs import (
    END_S,
    START_S,
    TIMED,
    Up,
    error_line,
    pdserve,
    pdserve_command,
    wait_readable,
)
from tests.support.waiting import wait_until

Start = Callable[..., Up]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `pdserve up` with the options given; every run ends with the test at the latest."""
    runs: list[Up] = []

    def run(*options: str) -> Up:
        runs.append(Up(*options))
        return runs[-1]

    yield run
    for each in runs:
        each.kill_all()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Up]:
    run = Up(*TIMED)
    try:
        yield run
        code, errors = run.end(signal.SIGTERM)
        assert (code, run.left()) == (0, []), errors
    finally:
        run.kill_all()


def test_up_says_what_it_started(cluster: Up) -> None:
    said = cluster.said
    assert said["ready"] is True
    assert [each["name"] for each in said["processes"]] == ["router", "prefill-0", "decode-0"]
    for each in said["processes"]:
        host, port = each["address"].split(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        assert psutil.pid_exists(each["pid"])
    assert len(cluster.left()) == 6  # itself, router and its tokenizer, fork server, two workers
    assert sorted(path.name for path in Path(said["log_dir"]).iterdir()) == [
        "decode-0.log",
        "fork-server.log",
        "prefill-0.log",
        "router.log",
    ]


def test_generate_streams_text_and_shows_where_the_time_went(cluster: Up) -> None:
    done = pdserve("generate", "def f():", "--max-tokens", "5", "--ignore-eos", cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert "+ 5 tokens, ended by length" in done.stderr.decode()
    assert "prefill-0 -> decode-0" in done.stderr.decode()
    assert "prefill " in done.stderr.decode()


def test_same_seed_gives_the_same_tokens_as_json(cluster: Up) -> None:
    options = ("-n", "6", "-t", "1", "--seed", "3", "--ignore-eos", "--json", "--logprobs", "1")
    answers = [
        json.loads(pdserve("generate", "-", *options, cluster=cluster, stdin=b"def g").stdout)
        for _ in range(2)
    ]
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert len(answers[0]["tokens"]) == 6
    assert answers[0]["usage"]["seed"] == 3
    assert answers[0]["timeline"]["decode_worker"] == "decode-0"


def test_token_ids_in_and_out(cluster: Up) -> None:
    done = pdserve("generate", "5 17 99", "--token-ids", "-n", "3", "--ignore-eos", cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert len([int(part) for part in done.stdout.split()]) == 3


def test_status_and_models_as_json(cluster: Up) -> None:
    state = json.loads(pdserve("status", "--json", cluster=cluster).stdout)
    assert {worker["hello"]["worker_id"] for worker in state["workers"]} == {
        "prefill-0",
        "decode-0",
    }
    assert all(worker["health"] == "alive" for worker in state["workers"])
    (model,) = json.loads(pdserve("models", "--json", cluster=cluster).stdout)
    assert model["name"] == "demo"


def test_status_and_models_as_tables(cluster: Up) -> None:
    status = pdserve("status", cluster=cluster).stdout.decode()
    assert "decode-0" in status
    assert "free + reserved + held + pinned = total" in status
    assert "demo" in pdserve("models", cluster=cluster).stdout.decode()


def test_bench_reports_and_writes_every_request(cluster: Up, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ("--rate", "30", "--requests", "12", "--slo-ttft", "5", "--slo-tpot", "5")
    done = pdserve("bench", *options, "--json-file", str(path), cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert "100.0%" in done.stdout.decode()
    result = json.loads(path.read_text())
    assert result["num_ok"] == 12
    assert [record["output_tokens"] for record in result["records"]] == [32] * 12
    assert result["attainment"] == 1.0
    assert sum(result["phase_share"].values()) == pytest.approx(1.0)
    assert 0 <= result["handoff_share"] < 1
    assert result["transferred_bytes"] > 0


def test_bench_replays_the_packaged_trace_fitted_to_the_model(cluster: Up, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ("--trace", "azure-code", "--time-scale", "0.02", "--requests", "20")
    done = pdserve("bench", *options, "--json-file", str(path), cluster=cluster)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["num_ok"] == 20
    assert max(record["prompt_tokens"] for record in result["records"]) <= 1024


async def test_no_block_is_held_after_all_that(cluster: Up) -> None:
    def is_idle() -> bool:
        state = json.loads(pdserve("status", "--json", cluster=cluster).stdout)
        return all(
            worker["load"]["kv"]["free"] == worker["load"]["kv"]["total"] == 1024
            for worker in state["workers"]
        )

    await wait_until(is_idle, within_s=5.0, what="every KV block free")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--model", "other"), 2, "served: demo"),
        (("--temperature", "9"), 2, "temperature"),
        (("--max-tokens", "5000"), 2, "5000"),
        (("--timeout", "0.001"), 1, "--timeout"),
    ],
)
def test_refused_request_is_one_clear_line(
    cluster: Up, options: tuple[str, ...], code: int, said: str
) -> None:
    done = pdserve("generate", "canary-prompt", *options, cluster=cluster)
    line = error_line(done)
    assert done.returncode == code, line
    assert said in line
    assert "canary" not in line


def test_empty_prompt_is_refused(cluster: Up) -> None:
    done = pdserve("generate", "", cluster=cluster)
    assert done.returncode == 2
    assert "at least 1 character" in error_line(done)


def test_input_that_is_not_utf8_is_refused(cluster: Up) -> None:
    done = pdserve("generate", "-", cluster=cluster, stdin=b"ab\xff")
    assert done.returncode == 2
    assert "not UTF-8 text (byte 2)" in error_line(done)


def test_swapped_addresses_are_explained(cluster: Up) -> None:
    done = pdserve("status", "-a", cluster.said["address"])
    assert done.returncode == 2
    assert "internal" in error_line(done)


@pytest.mark.parametrize("command", [("generate", "hi"), ("models",), ("status",), ("bench",)])
def test_no_cluster_is_one_clear_line(command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    done = pdserve(*command, "-a", address)
    assert done.returncode == 1
    line = error_line(done)
    assert f"{address}: connection refused" in line
    assert "`pdserve up`" in line


def test_port_in_use_is_told_before_anything_starts(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        run = start(*TIMED, "--port", str(port))
        code, errors = run.wait()
    assert code == 2
    assert f"port {port} on 127.0.0.1 is in use" in errors
    assert run.said["ready"] is False
    assert run.left() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "/no/such/model"), "no model directory at /no/such/model"),
        (("--set", "decode.replica=2"), "decode.replica: unknown field; did you mean replicas?"),
        (("--log-dir", "/dev/null/logs"), "log_dir /dev/null/logs"),
        (("--num-blocks", "100000000"), "lower num_blocks"),
        (
            ("--override-config", '{"max_context_tokens": 2000}'),
            "override_config.max_context_tokens: must be at most 1024",
        ),
        (("--override-config", '{"layers": 1}'), "override_config.layers: unknown field"),
        (("--override-config", "4096"), "--override-config 4096: expected an object"),
        (("/no/such/cluster.yaml",), "/no/such/cluster.yaml: no such file"),
    ],
)
def test_bad_settings_are_told_before_anything_starts(options: tuple[str, ...], said: str) -> None:
    done = pdserve("up", *TIMED, *options)
    assert done.returncode == 2
    assert said in error_line(done)


def test_model_directory_with_unreadable_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    done = pdserve("up", *TIMED, "--model", str(tmp_path))
    assert done.returncode == 2
    assert "cannot read" in error_line(done)
    assert "config.json" in error_line(done)


def test_process_that_does_not_start_takes_everything_down_with_its_log(
    start: Start, tmp_path: Path
) -> None:
    model = shutil.copytree(DEMO_MODEL_DIR, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    run = start("--port", "0", "--internal-port", "0", "--model", str(model))
    code, errors = run.wait()
    assert code == 1
    assert "did not start" in errors
    assert "nonsense" in errors  # its reason, or the end of its log
    assert run.said["ready"] is False
    assert run.left() == []


def test_interrupt_drains_and_leaves_nothing(start: Start) -> None:
    before = set(os.listdir("/dev/shm"))
    run = start(*TIMED, "--prefill", "2", "--decode", "2")
    assert run.said["ready"]
    assert len(run.left()) == 8  # the same, with four workers
    code, errors = run.end(signal.SIGINT)
    assert code == 0, errors
    assert "draining" in errors
    assert "nothing is left running" in errors
    assert run.left() == []
    assert not Path(run.said["log_dir"]).exists()
    assert {name for name in set(os.listdir("/dev/shm")) - before if "pdserve" in name} == set()


async def test_interrupt_while_starting_leaves_nothing(start: Start) -> None:
    run = start(*TIMED)

    def has_worker() -> bool:
        return sum("deploy.fork_server" in line for line in run.left()) > 1

    await wait_until(has_worker, within_s=START_S, what="a worker starting")
    code, errors = run.end(signal.SIGINT)
    assert code == 130, errors
    assert run.left() == []


async def test_killed_up_leaves_nothing(start: Start) -> None:
    run = start(*TIMED)
    assert run.said["ready"]
    run.child.kill()
    run.child.wait(END_S)
    await wait_until(lambda: not run.left(), within_s=10.0, what="no process left")


def test_second_interrupt_stops_at_once(start: Start) -> None:
    run = start(*TIMED, "--set", "coefficients.decode_token_s=0.2")
    asking = subprocess.Popen(
        pdserve_command("generate", "x", "-n", "500", "--ignore-eos", "-a", run.said["address"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert asking.stdout is not None
    asking.stdout.read(1)  # the answer has begun, and would go on for 100 s
    run.child.send_signal(signal.SIGINT)
    assert run.child.stderr is not None
    wait_readable(run.child.stderr, END_S)
    started = time.monotonic()
    code, errors = run.end(signal.SIGINT)
    assert time.monotonic() - started < 5.0
    assert code == 130, errors
    assert "stopping at once" in errors
    assert run.left() == []
    _, asked = asking.communicate(timeout=END_S)
    assert asking.returncode == 1
    assert asked.decode().startswith("pdserve: ")


def test_lost_process_is_reported_and_started_again(start: Start) -> None:
    run = start(*TIMED)
    for name in ("prefill-0", "decode-0", "router"):
        os.kill(run.pid_of(name), signal.SIGKILL)
        said = run.read_errors(until=f"{name} serves again")
        assert f"{name} was killed by SIGKILL; the end of" in said
        done = pdserve("generate", "x", "-n", "4", "--ignore-eos", cluster=run)
        assert done.returncode == 0, done.stderr
    timeline = json.loads(
        pdserve("generate", "x", "-n", "4", "--ignore-eos", "--json", cluster=run).stdout
    )["timeline"]
    assert timeline["prefill_worker"] == "prefill-0"
    code, errors = run.end(signal.SIGINT)
    assert code == 0, errors
    assert run.left() == []


def test_stop_while_a_process_is_started_again_leaves_nothing(start: Start) -> None:
    run = start(*TIMED)
    for name in ("decode-0", "prefill-0", "router"):
        os.kill(run.pid_of(name), signal.SIGKILL)
    run.read_errors(until="was killed by SIGKILL")
    code, errors = run.end(signal.SIGINT)
    assert code == 0, errors
    assert run.left() == []
