"""Workers of ranks as processes: of several hosts, paused, refused, and ended in order."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.forked import ForkedProcess
from deploy.processes import LocalProcess, environment
from pdserve.cli.problems import ClusterFailed
from pdserve.config.processes import WorkerSettings
from pdserve.domain.messages import Role
from pdserve.engine.ranks.silence import is_stopped
from tests.support.tiny_models import save_tiny_model
from tests.support.waiting import wait_until

WITHIN_S = 120.0
PAUSE_S = 4.0
"""Longer than any silence, or stop, that is a death."""
STEPS = {"fixed_s": 0.01, "prefill_token_s": 1e-4, "decode_token_s": 1e-4}
TIMED = {"engine": "timed", "tp": 2, "num_blocks": 16, "coefficients": STEPS}
TORCH = {"tp": 2, "num_blocks": 16, "coefficients": STEPS}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def settings(engine: dict[str, Any], **changes: Any) -> WorkerSettings:
    given = {"role": "decode", "worker_id": "decode-0", "engine": engine, **changes}
    return WorkerSettings.model_validate(given)


def nodes(engine: dict[str, Any], port: int, **changes: Any) -> list[WorkerSettings]:
    """A worker of two ranks, one on each of two hosts."""
    return [
        settings(
            engine if node == 0 else {**engine, **changes},
            ranks={"node": node, "per_node": 1, "leader": f"127.0.0.1:{port}"},
        )
        for node in (0, 1)
    ]


def process(given: WorkerSettings, folder: Path, server: str = "") -> LocalProcess:
    log = folder / f"node-{given.ranks.node}.log"
    if server:
        return ForkedProcess(server, given.worker_id, Role.DECODE, given, log)
    return LocalProcess(given.worker_id, Role.DECODE, given, log)


@contextlib.asynccontextmanager
async def started(*processes: LocalProcess) -> AsyncIterator[list[asyncio.Task[int]]]:
    """All of them at the same time; yields their exit codes to come."""
    try:
        async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as tasks:
            for each in processes:
                tasks.create_task(each.start())
        yield [asyncio.create_task(each.watch()) for each in processes]
    finally:
        for each in processes:
            each.signal(signal.SIGKILL)
            await each.wait()


@pytest.fixture(scope="module")
def fork_server() -> Iterator[str]:
    """The name of one that has imported what workers need."""
    name = f"pdserve-test-{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "deploy.fork_server", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield name
        server.kill()


async def codes_of(ends: list[asyncio.Task[int]]) -> list[int]:
    return list(await asyncio.wait_for(asyncio.gather(*ends), WITHIN_S))


@pytest.mark.parametrize("told", [0, 1])
async def test_hosts_of_a_worker_end_in_order_whichever_is_told_to(
    told: int, tmp_path: Path
) -> None:
    both = [process(each, tmp_path) for each in nodes(TIMED, free_port())]
    async with started(*both) as ends:
        both[told].signal(signal.SIGTERM)
        assert await codes_of(ends) == [0, 0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"block_size": 8}, "its block_size is 16; got 8"),
        ({"model": "demo-draft"}, "its model is "),
        ({"dtype": "bfloat16"}, "its dtype is float32; got bfloat16"),
    ],
)
async def test_host_of_another_plan_is_refused_with_the_reason(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    leader, other = (process(each, tmp_path) for each in nodes(TIMED, free_port(), **changes))
    leading = asyncio.create_task(leader.start())
    try:
        with pytest.raises(ClusterFailed, match=why):
            await asyncio.wait_for(other.start(), WITHIN_S)
        assert not leading.done()  # it waits for the right one
    finally:
        leader.signal(signal.SIGKILL)
        await asyncio.gather(leading, return_exceptions=True)


async def test_port_that_is_taken_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        leader, _ = (process(each, tmp_path) for each in nodes(TIMED, port))
        with pytest.raises(ClusterFailed, match=rf"cannot listen at 127.0.0.1:{port}"):
            await asyncio.wait_for(leader.start(), WITHIN_S)


async def test_model_that_cannot_be_divided_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_tiny_model("gpt2", tmp_path / "model")
    given = settings({**TORCH, "tp": 3, "model": str(tmp_path / "model")})
    worker = process(given, tmp_path)
    with pytest.raises(ClusterFailed, match=r"did not start: .*cannot be"):
        await asyncio.wait_for(worker.start(), WITHIN_S)
    await worker.wait()


async def test_ranks_of_two_hosts_compute_together_and_die_together(
    tmp_path: Path, fork_server: str
) -> None:
    port = free_port()
    both = [process(each, tmp_path, fork_server) for each in nodes(TORCH, port)]
    async with started(*both) as ends:
        [rank] = psutil.Process(both[1].pid).children()
        assert rank.name() == "pdserve-rank1"
        rank.kill()
        assert await codes_of(ends) == [1, 1]
    assert "rank 1 closed its connection" in both[0].last_words()
    assert "rank 1 was killed by signal 9" in both[1].last_words()
    # Neither ports nor anything else of the first life is in the way of the next.
    again = [process(each, tmp_path, fork_server) for each in nodes(TORCH, port)]
    async with started(*again) as ends:
        again[0].signal(signal.SIGTERM)
        assert await codes_of(ends) == [0, 0]


async def test_pause_of_a_whole_worker_is_no_death(tmp_path: Path, fork_server: str) -> None:
    worker = process(settings(TORCH), tmp_path, fork_server)
    async with started(worker) as ends:
        ranks = [worker.pid, *(each.pid for each in psutil.Process(worker.pid).children())]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        await wait_until(lambda: all(map(is_stopped, ranks)), within_s=10, what="all are stopped")
        await asyncio.sleep(PAUSE_S)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        done, _ = await asyncio.wait(ends, timeout=3.0)
        assert not done, worker.last_words()
        worker.signal(signal.SIGTERM)
        assert await codes_of(ends) == [0]
