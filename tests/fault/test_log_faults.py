"""Disks that are full, take no file or never return, and pipes that nobody reads: all is served.

No disk is on a request's way, so the only thing that such a disk can take are log lines.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.local import LocalCluster
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.errors import PdserveError, Reason
from tests.support.clusters import ANY_COEFFICIENTS
from tests.support.up_runs import START_S, wait_readable
from tests.support.waiting import wait_until

NUM_REQUESTS = 20
NAMES = ("router", "prefill-0", "decode-0")
SAMPLING = Sampling(max_tokens=4, ignore_eos=True)
DROPPED = "pdserve_log_lines_dropped_total"


def settings(log_dir: Path) -> ClusterSettings:
    return ClusterSettings.model_validate(
        {
            "engine": "timed",
            "coefficients": ANY_COEFFICIENTS,
            "log_dir": str(log_dir),
            "log_level": "debug",
            "router": {"port": 0, "internal_port": 0},
            "decode": {"max_local_prefill_tokens": 0},
        }
    )


async def ask_all(address: str) -> None:
    """Requests one after another, each answered whole; one that cannot be is told so alone."""
    async with InferenceClient(address) as client:
        for first in range(NUM_REQUESTS):
            prompt = range(first + 20, first + 60)
            answer = await client.complete(tuple(prompt), SAMPLING, timeout_s=20)
            assert len(answer.tokens) == 4
        with pytest.raises(PdserveError) as caught:
            await client.complete((1,), Sampling(max_tokens=100_000), timeout_s=20)
        assert caught.value.reason is Reason.CONTEXT_TOO_LONG
        assert "Errno" not in caught.value.message


def num_dropped(metrics_address: str) -> float:
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith(DROPPED)]
    return float(line.split()[1])


async def all_dropped(addresses: Sequence[str]) -> None:
    async def count(address: str) -> float:
        return await asyncio.to_thread(num_dropped, address)

    async with asyncio.timeout(10):
        while not all([await count(address) for address in addresses]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    path.symlink_to("/dev/full")
    yield


@contextlib.contextmanager
def no_such_folder(path: Path) -> Iterator[None]:
    path.symlink_to("/proc/nothing/is.log")  # as on a disk that became read-only
    yield


@contextlib.contextmanager
def stuck_disk(path: Path) -> Iterator[None]:
    """A write to a full pipe returns as soon as one to a disk that hangs does."""
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fill(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    try:
        yield
    finally:
        os.close(reading)


def fill(writing: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.close(writing)


Fault = Callable[[Path], contextlib.AbstractContextManager[None]]


@pytest.mark.parametrize("fault", [full_disk, no_such_folder, stuck_disk])
async def test_log_files_that_cannot_be_written_take_nothing_but_log_lines(
    tmp_path: Path, fault: Fault
) -> None:
    with contextlib.ExitStack() as faults:
        for name in NAMES:
            faults.enter_context(fault(tmp_path / f"{name}.log"))
        async with LocalCluster.start(settings(tmp_path)) as cluster:
            await ask_all(cluster.public_address)
            if fault is not stuck_disk:  # whose lines wait in the queue
                await all_dropped([row.metrics_address for row in cluster.rows])


async def test_log_says_how_many_lines_are_missing_once_the_disk_has_room(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    path.symlink_to("/dev/full")
    async with LocalCluster.start(settings(tmp_path)) as cluster:
        await ask_all(cluster.public_address)
        (address,) = [row.metrics_address for row in cluster.rows if row.name == "router"]
        await all_dropped([address])
        path.unlink()  # whatever makes room: the file is opened again
        await wait_until(path.exists, within_s=10, what="the log is written again")
        await wait_until(
            lambda: "log.dropped" in path.read_text(), within_s=10, what="the notice is written"
        )
        notice = json.loads(path.read_text().splitlines()[0])
        assert notice["event"] == "log.dropped"
        assert notice["why"] == "No space left on device"
        assert 0 < notice["num_lines"] <= await asyncio.to_thread(num_dropped, address)


async def test_log_files_rotate_within_their_limits(tmp_path: Path) -> None:
    chosen = settings(tmp_path).model_copy(update={"max_log_bytes": 1 << 16, "num_log_files": 2})
    rotated = tmp_path / "router.log.1"
    async with (
        LocalCluster.start(chosen) as cluster,
        InferenceClient(cluster.public_address) as client,
        asyncio.timeout(60),
    ):
        while not rotated.exists():
            await client.complete((21, 22, 23), SAMPLING, timeout_s=20)
    check_sizes(tmp_path)


def check_sizes(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert max(sizes.values()) <= 1 << 16
    assert len([name for name in sizes if name.startswith("router")]) == 2


def unread_pipe() -> tuple[int, list[int]]:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fill(os.dup(writing))
    os.set_blocking(writing, True)
    return writing, [reading, writing]


def closed_pipe() -> tuple[int, list[int]]:
    reading, writing = os.pipe()
    os.close(reading)
    return writing, [writing]


def full_file() -> tuple[int, list[int]]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    return descriptor, [descriptor]


@contextlib.asynccontextmanager
async def containers(stderr: int) -> AsyncIterator[list[dict[str, Any]]]:
    """A router and two workers as an image's commands start them; their ready lines."""
    cluster = settings(Path())
    running: list[subprocess.Popen[bytes]] = []
    ready: list[dict[str, Any]] = []

    async def start(module: str, told: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--settings", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(told.encode())
        process.stdin.close()
        await asyncio.to_thread(wait_readable, process.stdout, START_S)
        line = process.stdout.readline()
        process.stdout.close()  # whoever started it has seen enough
        ready.append(json.loads(line))

    try:
        await start("router", cluster.router_settings().model_dump_json())
        internal = ready[0]["internal_address"]
        prefill, decode = cluster.worker_settings(internal)
        await start("prefill_worker", prefill.model_dump_json())
        await start("decode_worker", decode.model_dump_json())
        async with AdminClient(internal) as admin, asyncio.timeout(30):
            while [w.health for w in (await admin.cluster_state()).workers] != ["alive"] * 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        yield ready
        for process in running:
            process.terminate()
        for process in running:
            assert await asyncio.to_thread(process.wait, 15) == 0
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize("opened", [unread_pipe, closed_pipe, full_file])
async def test_standard_error_that_nobody_reads_takes_nothing_but_log_lines(
    opened: Callable[[], tuple[int, list[int]]],
) -> None:
    stderr, descriptors = opened()
    try:
        async with containers(stderr) as ready:
            await ask_all(ready[0]["address"])
            if opened is not unread_pipe:
                await all_dropped([each["metrics_address"] for each in ready])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
