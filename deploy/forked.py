"""A worker forked from the fork server of its machine, seen from the process that asked for it."""

import asyncio
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from signal import SIGKILL, SIGTERM, pidfd_send_signal
from typing import Any, BinaryIO, Literal

from deploy.processes import Child, LocalProcess, ProcessRole, environment
from pdserve.config.base import Settings
from pdserve.domain.errors import LocalFault

ANSWERS_S = 5.0
KILLED = -int(SIGKILL)


class ForkServer:
    """Owns the fork server of a machine. Starting it takes as long as starting a worker does."""

    def __init__(self, name: str = "", engine: Literal["torch", "timed"] = "torch") -> None:
        self.name = name or f"pdserve-fork-{secrets.token_hex(8)}"
        self._engine = engine
        self._child: asyncio.subprocess.Process | None = None

    async def start(self, log: BinaryIO | None = None) -> None:
        """Return once it can fork; raises `LocalFault` if it cannot. `log` takes its stderr."""
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.fork_server", self.name, "--engine", self._engine),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=environment(),
            start_new_session=True,
        )
        assert self._child.stdout is not None
        if (await self._child.stdout.readline()).strip() != b"ready":
            raise LocalFault(f"the fork server ended with code {await self._child.wait()}")

    async def close(self) -> None:
        """Workers that it forked live on."""
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()


class ForkedProcess(LocalProcess):
    """A `LocalProcess` that begins as a fork; without a server that answers it begins as usual."""

    def __init__(
        self,
        server: str,
        name: str,
        role: ProcessRole,
        settings: Settings,
        log_path: Path,
        *,
        dies_at_once: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, role, settings, log_path, dies_at_once=dies_at_once, env=env)
        self._server = server

    async def _spawn(self, log: BinaryIO) -> Child:
        request = {
            "role": self.role,
            "environment": {**environment(), **self.env},
            "on_parent_death": SIGKILL if self.dies_at_once else SIGTERM,
        }
        try:
            return await ForkedChild.ask(
                self._server, request, self.settings.model_dump_json(), log
            )
        except (OSError, TimeoutError):
            return await super()._spawn(log)


class ForkedChild:
    """A child of another process, followed by its pidfd."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, status: int, lifeline: int) -> None:
        self.pid = pid
        self.stdout: asyncio.StreamReader | None = stdout
        self.returncode: int | None = None
        self._status = status
        self._lifeline = lifeline  # open for as long as the child may live
        self._pidfd = os.pidfd_open(pid)
        self._end = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    @classmethod
    async def ask(
        cls, server: str, request: Mapping[str, Any], settings: str, log: BinaryIO
    ) -> "ForkedChild":
        """Raises `OSError` or `TimeoutError` where no server of that name forks."""
        output, their_output = os.pipe()
        status, their_status = os.pipe()
        their_lifeline, lifeline = os.pipe()
        given = os.memfd_create("settings")
        theirs = [given, their_output, log.fileno(), their_status, their_lifeline]
        try:
            os.write(given, settings.encode())
            os.lseek(given, 0, os.SEEK_SET)
            asked = json.dumps(request).encode()
            pid = await asyncio.to_thread(_exchange, server, asked, theirs)
            return cls(pid, await _reader(output), status, lifeline)
        except BaseException:
            for descriptor in (output, status, lifeline):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (given, their_output, their_status, their_lifeline):
                os.close(descriptor)

    async def wait(self) -> int:
        await self._end.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signal: int) -> None:
        pidfd_send_signal(self._pidfd, signal)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        """The server has the exit code; without a server nobody has."""
        said = await asyncio.to_thread(os.read, self._status, 16)
        self.returncode = int(said) if said else KILLED
        for descriptor in (self._pidfd, self._status, self._lifeline):
            os.close(descriptor)
        self._end.set()


def _exchange(server: str, request: bytes, descriptors: list[int]) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWERS_S)
        connection.connect(f"\0{server}")
        socket.send_fds(connection, [request], descriptors)
        answer = connection.recv(64)
        if not answer:
            raise OSError("the fork server did not answer")
        return int(answer)


async def _reader(descriptor: int) -> asyncio.StreamReader:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    file = os.fdopen(descriptor, "rb", 0)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return reader
