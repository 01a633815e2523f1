"""What surrounds a cluster: proxies in the environment, IPv6, terminals that are gone or odd."""

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.domain.addresses import join_address, split_address
from tests.support.up_runs import END_S, MARK, TIMED, Up, pdserve, pdserve_command
from tests.support.waiting import wait_until

NOBODY = "http://127.0.0.1:9"
PROXIES = {
    name: NOBODY
    for lower in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    for name in (lower, lower.upper())
} | {"no_proxy": "", "NO_PROXY": ""}
PROMPT = ("generate", "5 17 99", "--token-ids", "-n", "3", "--ignore-eos")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("--host", "127.0.0.1"), id="ipv4"),
        pytest.param(
            ("--host", "[0:0::1]", "--set", "transports=[tcp]"),
            id="ipv6",
            marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1"),
        ),
        pytest.param(("--host", "LocalHost"), id="name"),
    ],
)
def cluster(request: pytest.FixtureRequest) -> Iterator[Up]:
    """Started where proxies are named that nobody listens at."""
    run = Up(*TIMED, *request.param, env=PROXIES)
    try:
        assert run.said.get("ready"), run.said
        yield run
        code, errors = run.end(signal.SIGTERM)
        assert (code, run.left()) == (0, []), errors
    finally:
        run.kill_all()


def test_cluster_is_ready_and_answers_whatever_proxies_are_named(cluster: Up) -> None:
    done = pdserve(*PROMPT, "--json", cluster=cluster, env=PROXIES)
    assert len(json.loads(done.stdout)["tokens"]) == 3
    for command in (("status",), ("models",), ("smoke",), ("bench", "--requests", "3")):
        done = pdserve(*command, cluster=cluster, env=PROXIES)
        assert done.returncode == 0, done.stderr


def test_every_address_is_one_that_can_be_dialled(cluster: Up) -> None:
    said = cluster.said
    addresses = [said["address"], said["internal_address"]]
    addresses += [each["address"] for each in said["processes"]]
    for address in addresses:
        host, port = split_address(address)
        assert join_address(host, port) == address
        socket.create_connection((host, port), 5).close()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for each in said["processes"]:
        with opener.open(f"http://{each['metrics_address']}/metrics", timeout=10) as reply:
            assert b"pdserve_build_info" in reply.read()


def test_prompts_are_read_elsewhere_and_handed_over(cluster: Up) -> None:
    ids = " ".join(str(20 + index) for index in range(200))
    done = pdserve("generate", ids, "--token-ids", "-n", "3", "--json", cluster=cluster)
    assert json.loads(done.stdout)["timeline"]["prefill_worker"] == "prefill-0"


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("::1:7450:", "'::1:7450:' is not an IPv6 address"),
        ("127.0.0.1:7450", "'127.0.0.1:7450' is a host with a port"),
        ("[::1", "'[::1' has only one of its two brackets"),
        ("::", "host must be a loopback address, got '::'"),
        ("[::ffff:10.0.0.1]", "host must be a loopback address"),
        ("", "the host is missing"),
    ],
)
def test_host_that_cannot_be_is_refused_with_what_is_wrong(host: str, problem: str) -> None:
    done = pdserve("up", *TIMED, "--host", host)
    assert done.returncode == 2
    assert problem in done.stderr.decode()


STREAMS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
COMMANDS = [
    ("generate", "日本", "-n", "20", "--ignore-eos"),
    ("generate", "日本", "-n", "20", "--stop", "本", "--logprobs", "1"),
    ("generate", "日本", "-n", "3", "--json"),
    ("bench", "--requests", "3", "--rate", "50"),
    ("bench", "--requests", "3", "--rate", "50", "--json"),
    ("status",),
    ("models",),
    ("smoke",),
]


@pytest.fixture(scope="module")
def plain() -> Iterator[Up]:
    run = Up(*TIMED)
    try:
        assert run.said["ready"]
        yield run
    finally:
        run.kill_all()


@pytest.mark.parametrize("env", STREAMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_well_on_streams_without_utf8(
    plain: Up, command: tuple[str, ...], env: dict[str, str]
) -> None:
    addresses = {
        "PDSERVE_ADDRESS": plain.said["address"],
        "PDSERVE_INTERNAL_ADDRESS": plain.said["internal_address"],
    }
    done = subprocess.run(
        pdserve_command(*command),
        capture_output=True,
        env={**os.environ, **addresses, **env},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    if "--json" in command:
        json.loads(done.stdout)


def test_prompt_that_is_not_utf8_is_refused_in_one_line(plain: Up) -> None:
    command = [os.fsencode(part) for part in pdserve_command("generate")]
    done = subprocess.run(
        [*command, b"caf\xe9", b"-a", plain.said["address"].encode()], capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr == b"pdserve: the prompt is not UTF-8 text (byte 3)\n"
    done = subprocess.run([*command, b"x", b"--stop", b"caf\xe9"], capture_output=True)
    assert done.returncode == 2
    assert b"not UTF-8 text (byte 3)" in done.stderr


async def test_up_serves_on_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """The pipes of `pdserve up 2>&1 | head -1`, and a terminal that `nohup` outlives."""
    reading, writing = os.pipe()
    mark = {MARK: str(tmp_path)}
    child = subprocess.Popen(
        ["nohup", *pdserve_command("up", *TIMED, "--json", "--log-dir", str(tmp_path))],
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
        env={**os.environ, **mark},
        start_new_session=True,
    )
    os.close(writing)
    try:
        said = json.loads(os.read(reading, 1 << 16).splitlines()[-1])
        os.close(reading)
        child.send_signal(signal.SIGHUP)
        prefill = next(each["pid"] for each in said["processes"] if each["name"] == "prefill-0")
        os.kill(prefill, signal.SIGKILL)  # which `up` would tell
        done = pdserve(*PROMPT, "-a", said["address"])
        assert done.returncode == 0, done.stderr
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        ended = child.poll
        await wait_until(lambda: ended() is not None, within_s=END_S, what="up ends")
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()
