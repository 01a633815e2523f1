"""One process of a local cluster: started, watched, stopped."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from deploy import fork_server
from pdserve.cli.problems import ClusterFailed
from pdserve.config.base import Settings
from pdserve.config.processes import WorkerSettings
from pdserve.domain.messages import Role
from pdserve.observe.log_sinks import rotated_paths

ProcessRole = Role | Literal["router"]
MODULES = {"router": "router", **fork_server.MODULES}
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
NUM_LOG_LINES = 8
MAX_LOG_LINE_CHARS = 300
MAX_LOG_TAIL_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A process's own word that it serves."""

    address: str
    internal_address: str
    metrics_address: str = ""  # empty: no metrics


class Child(Protocol):
    """A child process, however it was made; `asyncio.subprocess.Process` is one."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    @property
    def stdout(self) -> asyncio.StreamReader | None: ...

    async def wait(self) -> int: ...

    def send_signal(self, signal: int) -> None: ...


class LocalProcess:
    """Owns one child process. Its stderr is the log file; its stdout says when it is ready.

    The child itself keeps the log file within its limits, and opens it again after a rotation.
    When its parent dies, however it dies, the child drains, or ends at once if it `dies_at_once`.
    """

    def __init__(
        self,
        name: str,
        role: ProcessRole,
        settings: Settings,
        log_path: Path,
        *,
        dies_at_once: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.role = role
        self.settings = settings.model_copy(update={"log_file": str(log_path.absolute())})
        self.log_path = log_path
        self.ready: Ready | None = None
        self.dies_at_once = dies_at_once
        self.env = env or {}  # beside what every process sees
        self._child: Child | None = None
        self._stdin: asyncio.StreamWriter | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.name} was not started"
        return self._child.pid

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.returncode is None

    @property
    def num_blocks(self) -> int:
        """KV blocks; none in a router, nor known of a worker whose GPU decides."""
        if not isinstance(self.settings, WorkerSettings):
            return 0
        return self.settings.engine.planned_num_blocks or 0

    @property
    def num_ranks(self) -> int:
        return self.settings.engine.num_ranks if isinstance(self.settings, WorkerSettings) else 1

    async def start(self) -> Ready:
        """Start and wait for its ready line; raises `ClusterFailed` with its reason or its log."""
        with opened_log(self.log_path) as log:
            self._child = await self._spawn(log)
        await self._send_settings()
        self.ready = await self._read_ready(self._child)
        return self.ready

    async def watch(self) -> int:
        """Its exit code, once it ended; drops what it still prints. One task may call this."""
        assert self._child is not None
        assert self._child.stdout is not None
        while await self._child.stdout.read(4096):
            pass
        return await self._child.wait()

    async def wait(self) -> None:
        """Until it ended; returns at once where it never started. Any task may call this."""
        if self._child is not None:
            await self._child.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens where it has ended already."""
        if self._child is not None and self._child.returncode is None:
            try:
                self._child.send_signal(number)
            except ProcessLookupError:
                return

    def last_words(self) -> str:
        """The end of its log, a line each, indented."""
        lines = _tail(self.log_path) or ["(empty)"]
        return "\n".join(f"    {line[:MAX_LOG_LINE_CHARS]}" for line in lines)

    async def _spawn(self, log: BinaryIO) -> "Child":
        """Start the child, whose stderr is `log`."""
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULES[self.role]),
            *("--settings", "-"),
            "--die-with-parent" if self.dies_at_once else "--exit-with-parent",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**environment(), **self.env},
            start_new_session=True,  # Ctrl-C on the terminal is for us: we drain in order
        )
        self._stdin = child.stdin
        return child

    async def _send_settings(self) -> None:
        """To its stdin, unless it was started with them."""
        if self._stdin is None:
            return
        self._stdin.write(self.settings.model_dump_json().encode())
        try:
            await self._stdin.drain()
            self._stdin.close()
            await self._stdin.wait_closed()
        except (BrokenPipeError, ConnectionResetError):
            return  # it died first; reading its stdout tells

    async def _read_ready(self, child: "Child") -> Ready:
        assert child.stdout is not None
        while line := await child.stdout.readline():
            said = _parse_line(line)
            if said.get("ready") is True:
                address = str(said.get("address", ""))
                return Ready(
                    address=address,
                    internal_address=str(said.get("internal_address", address)),
                    metrics_address=str(said.get("metrics_address", "")),
                )
            if said.get("ready") is False:
                await child.wait()
                raise ClusterFailed(f"{self.name} did not start: {said.get('error')}")
        code = await child.wait()
        raise ClusterFailed(
            f"{self.name} did not start: it {describe_exit(code)}; the end of {self.log_path}:\n"
            f"{self.last_words()}"
        )


BY_SIGNAL = "was killed by"


def describe_exit(code: int) -> str:
    """In words; negative codes are signals."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"{BY_SIGNAL} {signal.Signals(-code).name}"
    except ValueError:
        return f"{BY_SIGNAL} signal {-code}"


def environment() -> Mapping[str, str]:
    """What a serving process sees."""
    # One compute thread a worker: pools share the machine, and batches give the parallelism.
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def opened_log(path: Path) -> BinaryIO:
    """The log file to append to; if the disk takes none, a worker that restarts serves without."""
    try:
        return path.open("ab")
    except OSError:
        return open(os.devnull, "ab")


def _tail(path: Path) -> list[str]:
    """The last lines; those before the latest rotation where the file has only a few yet."""
    newest, previous = rotated_paths(path, 2)
    lines = _last_lines(newest)
    if len(lines) < NUM_LOG_LINES:
        lines = [*_last_lines(previous), *lines]
    return lines[-NUM_LOG_LINES:]


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LOG_TAIL_BYTES))
            return file.read(MAX_LOG_TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []


def _parse_line(line: bytes) -> Mapping[str, Any]:
    """A line that is no JSON object was printed by some library: it says nothing."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
