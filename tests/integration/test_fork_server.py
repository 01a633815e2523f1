"""Workers that begin as forks: alike in all to those that begin as a program."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from deploy.forked import ForkedChild, ForkedProcess, ForkServer
from pdserve.cli.problems import ClusterFailed
from pdserve.config.processes import WorkerSettings
from tests.support.clusters import demo_engine, timed_engine
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")
GONE_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def name() -> str:
    return f"pdserve-test-{secrets.token_hex(8)}"


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def server(name: str) -> AsyncIterator[ForkServer]:
    server = ForkServer(name)
    await server.start()
    yield server
    await server.close()


def worker(
    name: str, folder: Path, *, dies_at_once: bool = False, **changes: object
) -> ForkedProcess:
    fields = {"role": "decode", "worker_id": "decode-0", "engine": timed_engine(), **changes}
    settings = WorkerSettings.model_validate(fields)
    log = folder / "decode-0.log"
    return ForkedProcess(name, "decode-0", settings.role, settings, log, dies_at_once=dies_at_once)


def is_forked(process: ForkedProcess) -> bool:
    return "deploy.fork_server" in psutil.Process(process.pid).cmdline()


async def test_fork_serves_drains_and_tells_its_exit_code(name: str, tmp_path: Path) -> None:
    process = worker(name, tmp_path)
    ready = await process.start()
    assert is_forked(process)
    assert ready.address.startswith("127.0.0.1:")
    assert psutil.Process(process.pid).name() == "pdserve-decode"
    assert os.getsid(process.pid) == process.pid
    ending = asyncio.create_task(process.watch())
    process.signal(signal.SIGTERM)
    assert await ending == 0
    assert "worker.drained" in process.log_path.read_text()


async def test_model_that_cannot_be_loaded_is_told_as_by_any_worker(
    name: str, tmp_path: Path
) -> None:
    process = worker(name, tmp_path, engine=demo_engine(tp=3))
    with pytest.raises(ClusterFailed, match="tp 3"):
        await process.start()


async def test_killed_fork_is_seen(name: str, tmp_path: Path) -> None:
    process = worker(name, tmp_path)
    await process.start()
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(GONE_WITHIN_S):
        assert await process.watch() == -signal.SIGKILL


def _cut_lifeline(process: ForkedProcess) -> None:
    """As the death of the process that asked for it would."""
    child = process._child
    assert isinstance(child, ForkedChild)
    child._lifeline = _replaced(child._lifeline)


def _replaced(descriptor: int) -> int:
    """Close one end of a pipe, as the death of its process would; another takes its number."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
    return descriptor


async def test_fork_dies_with_the_one_that_asked_even_if_it_is_stopped(
    name: str, tmp_path: Path
) -> None:
    process, other = (worker(name, tmp_path, dies_at_once=True) for _ in range(2))
    await process.start()
    await other.start()
    os.kill(process.pid, signal.SIGSTOP)
    _cut_lifeline(process)
    async with asyncio.timeout(GONE_WITHIN_S):
        assert await process.watch() == -signal.SIGKILL
    assert psutil.pid_exists(other.pid)
    other.signal(signal.SIGKILL)
    await other.wait()


async def test_fork_drains_once_the_one_that_asked_is_gone(name: str, tmp_path: Path) -> None:
    process = worker(name, tmp_path)
    await process.start()
    _cut_lifeline(process)
    async with asyncio.timeout(GONE_WITHIN_S):
        assert await process.watch() == 0
    assert "worker.drained" in process.log_path.read_text()


def pipes_of(pid: int) -> set[str]:
    targets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    return {target for target in targets if target.startswith("pipe:")}


async def test_forks_do_not_hold_each_others_pipes(name: str, tmp_path: Path) -> None:
    first, second = worker(name, tmp_path), worker(name, tmp_path)
    await first.start()
    await second.start()
    pipes = [pipes_of(each.pid) for each in (first, second)]
    assert pipes[0]
    assert not pipes[0] & pipes[1]
    for each in (first, second):
        each.signal(signal.SIGKILL)
        await each.wait()


async def test_without_a_server_a_worker_begins_as_a_program(tmp_path: Path) -> None:
    process = worker("pdserve-nobody", tmp_path)
    await process.start()
    assert not is_forked(process)
    process.signal(signal.SIGKILL)
    await process.wait()


async def test_workers_outlive_their_server(tmp_path: Path) -> None:
    name = f"pdserve-test-{secrets.token_hex(8)}"
    server = ForkServer(name)
    await server.start()
    process = worker(name, tmp_path)
    await process.start()
    await server.close()
    assert psutil.pid_exists(process.pid)
    ending = asyncio.create_task(process.watch())
    process.signal(signal.SIGTERM)
    async with asyncio.timeout(GONE_WITHIN_S):
        await ending
    await wait_until(lambda: not psutil.pid_exists(process.pid), within_s=5, what="it is gone")
