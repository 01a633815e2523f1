"""Finding the clusters that are up, and stopping one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import runs
from deploy.runs import Run, choose, noted_run, running, runs_dir, stop
from pdserve.cli.problems import ClusterFailed
from pdserve.domain.errors import LocalFault

DRAINS = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print(1, flush=True)"
STAYS = "import signal; signal.signal(15, lambda *_: None); print(1, flush=True)"
FOREVER = "\nwhile True: signal.pause()"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    with start(DRAINS) as process:
        yield process
        process.kill()


def start(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code + FOREVER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    return process


def run_of(pid: int, address: str = "127.0.0.1:7450") -> Run:
    return Run(
        pid=pid, backend="local", address=address, internal_address="127.0.0.1:1", drain_s=5.0
    )


def test_a_run_is_listed_while_its_block_lasts(program: subprocess.Popen[bytes]) -> None:
    assert running() == []
    with noted_run(run_of(program.pid), pytest.fail):
        (found,) = running()
        assert (found.pid, found.address) == (program.pid, "127.0.0.1:7450")
    assert running() == []


def test_a_killed_run_is_forgotten_and_its_number_is_nobody_elses(
    program: subprocess.Popen[bytes],
) -> None:
    path = runs_dir() / "1.json"
    for born in ("", "17"):  # not known, or of an earlier process with the same number
        path.write_text(json.dumps({**_fields(run_of(program.pid)), "born": born}))
        assert running() == []
        assert not path.exists()
    path.write_text("{torn")
    assert running() == []


def test_stopping_ends_the_process(program: subprocess.Popen[bytes]) -> None:
    with noted_run(run_of(program.pid), pytest.fail):
        (found,) = running()
        # Only a parent can tell a zombie from a process; here the parent is this test.
        assert stop(found) < 5.0
        assert program.wait(5.0) == 0
        assert running() == []


def test_one_that_does_not_stop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "GRACE_S", 0.1)
    with (
        start(STAYS) as process,
        noted_run(replace(run_of(process.pid), drain_s=0.1), pytest.fail),
    ):
        (found,) = running()
        with pytest.raises(ClusterFailed, match=f"did not stop; its process is {process.pid}"):
            stop(found)
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("folder", ["/dev/null", "/proc"])
def test_a_disk_that_takes_no_file_is_told_and_the_cluster_serves(
    monkeypatch: pytest.MonkeyPatch, program: subprocess.Popen[bytes], folder: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    told: list[str] = []
    with noted_run(run_of(program.pid), told.append):
        (line,) = told
        assert f"will not find this cluster (pid {program.pid})" in line
        assert folder in line


def test_choosing() -> None:
    one, two = run_of(1), run_of(2, "127.0.0.1:9999")
    assert choose([one], None) == [one]
    assert choose([one, two], "127.0.0.1:9999") == [two]
    with pytest.raises(ClusterFailed, match="no cluster of this user is up"):
        choose([], None)
    with pytest.raises(LocalFault, match=r"2 clusters are up: .*9999.*name one by --address"):
        choose([one, two], None)
    with pytest.raises(LocalFault, match=r"no cluster is up at 127\.0\.0\.1:5"):
        choose([one], "127.0.0.1:5")


def test_a_folder_of_somebody_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_dir()
    monkeypatch.setattr(os, "getuid", lambda: 123456)
    with pytest.raises(LocalFault, match="belongs to another user"):
        runs_dir()


def _fields(run: Run) -> dict[str, object]:
    return {name: getattr(run, name) for name in Run.__slots__}
