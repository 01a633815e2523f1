"""What runs inside Ray: an actor for each rank, and a flag that stops the cluster.

An actor only starts, watches and stops its serving process and passes on its log; requests, tokens
and KV go between the serving processes themselves. Ray imports this module on every node, so it
imports little.
"""

import asyncio
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deploy.forked import ForkedProcess, ForkServer
from deploy.log_follower import LogFollower
from deploy.processes import VISIBLE_GPUS, LocalProcess, ProcessRole, Ready, describe_exit
from pdserve.config.base import Settings
from pdserve.config.binding import listen
from pdserve.config.processes import RouterSettings, WorkerSettings
from pdserve.domain.errors import LocalFault, PdserveError
from pdserve.domain.ids import PROTOCOL_VERSION

LOG_POLL_S = 0.2
MAX_LOG_BYTES = 1 << 20  # in one answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where an actor runs."""

    node_id: str
    host: str
    pid: int
    protocol_version: int
    gpus: str  # CUDA_VISIBLE_DEVICES as Ray has set it; empty: none


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The serving process's own word."""

    pid: int
    ready: Ready


@dataclass(frozen=True, slots=True)
class NotStarted:
    message: str


class RankActor:
    """One rank's place on a node, and its process; that of rank 0 is the worker to all others.

    The process ends at once when this actor does, whatever ends it: the one that takes its place
    must not meet it.
    """

    def __init__(self) -> None:
        self._process: LocalProcess | None = None
        self._end: asyncio.Task[int] | None = None
        self._log_dir: Path | None = None
        self._log: LogFollower | None = None

    async def site(self) -> Site:
        import ray

        return Site(
            node_id=ray.get_runtime_context().get_node_id(),
            host=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            protocol_version=PROTOCOL_VERSION,
            gpus=os.environ.get(VISIBLE_GPUS, ""),
        )

    async def free_port(self, host: str) -> int:
        """A port that is free at `host`; whoever takes it first has it."""
        with listen(host, 0) as listener:
            port: int = listener.getsockname()[1]
        return port

    async def start(
        self, name: str, role: ProcessRole, settings: str, fork_server: str
    ) -> Started | NotStarted:
        """Run the serving process; `settings` is JSON, an empty `fork_server` is none."""
        kind: type[Settings] = RouterSettings if role == "router" else WorkerSettings
        told = kind.model_validate_json(settings)
        try:
            self._log_dir = Path(tempfile.mkdtemp(prefix=f"pdserve-{name}-"))
        except OSError as error:
            return NotStarted(f"{name}: no folder for its log file: {error.strerror}")
        log_path = self._log_dir / f"{name}.log"
        process = (
            ForkedProcess(fork_server, name, role, told, log_path, dies_at_once=True)
            if fork_server
            else LocalProcess(name, role, told, log_path, dies_at_once=True)
        )
        self._process = process
        try:
            ready = await process.start()
        except PdserveError as error:
            return NotStarted(error.message)
        self._end = asyncio.create_task(process.watch())
        return Started(pid=process.pid, ready=ready)

    async def ended(self) -> str:
        """Once the serving process has ended: how, and the end of its log."""
        assert self._end is not None, "nothing was started"
        assert self._process is not None
        code = await asyncio.shield(self._end)
        return f"{describe_exit(code)}; the end of its log:\n{self._process.last_words()}"

    async def next_log(self) -> bytes:
        """What was logged since the last call, once there is some; empty when it is over."""
        while self._process is not None:
            is_over = not self._process.is_running
            if self._log is None:
                self._log = LogFollower(self._process.log_path)
            if chunk := self._log.read(MAX_LOG_BYTES):
                return chunk
            if is_over:
                break
            await asyncio.sleep(LOG_POLL_S)
        return b""

    async def signal(self, number: int) -> None:
        if self._process is not None:
            self._process.signal(signal.Signals(number))

    async def ping(self) -> None:
        """Answers as long as this actor does."""

    async def close(self, keeps_log: bool) -> None:
        """End the serving process, wait until it is gone, and remove its log unless kept."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL)
            await self._process.wait()
        if self._log is not None:
            self._log.close()
        if self._log_dir is not None and not keeps_log:
            shutil.rmtree(self._log_dir, ignore_errors=True)


class NodeActor:
    """Keeps a fork server on its node, so that workers begin there in a second, not in four."""

    def __init__(self) -> None:
        self._server: ForkServer | None = None

    async def start(self, name: str) -> str:
        """Empty once the server forks; else why it does not."""
        self._server = ForkServer(name)
        try:
            await self._server.start()
        except LocalFault as fault:
            return fault.message
        return ""

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()


class StopFlag:
    """Lets `pdserve down` reach a `pdserve up` that runs elsewhere. Lives as long as that does."""

    def __init__(self, address: str, drain_s: float) -> None:
        self._address = address
        self._drain_s = drain_s
        self._is_set = asyncio.Event()

    async def describe(self) -> tuple[str, float]:
        """The cluster's public address and its drain limit in seconds."""
        return self._address, self._drain_s

    async def set(self) -> None:
        self._is_set.set()

    async def wait(self) -> None:
        await self._is_set.wait()
