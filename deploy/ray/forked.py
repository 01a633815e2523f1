"""A worker forked from its node's fork server, seen from the actor that asked for it."""

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from signal import SIGKILL, pidfd_send_signal
from typing import BinaryIO

from deploy.processes import Child, LocalProcess, ProcessRole, environment
from pdserve.config.base import Settings
from pdserve.domain.errors import LocalFault

ANSWERS_S = 5.0
KILLED = -int(SIGKILL)


class ForkServer:
    """Owns the fork server of a node. Starting it takes as long as starting a worker does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Until it can fork; raises `LocalFault` where it cannot."""
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.ray.fork_server", self._name),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
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
    """A `LocalProcess` that begins as a fork; without a server that answers it begins as usual.

    The kernel kills it as soon as this process ends.
    """

    def __init__(
        self, server: str, name: str, role: ProcessRole, settings: Settings, log_path: Path
    ) -> None:
        super().__init__(name, role, settings, log_path, dies_at_once=True)
        self._server = server

    async def _spawn(self, log: BinaryIO) -> Child:
        try:
            settings = self.settings.model_dump_json()
            return await ForkedChild.ask(self._server, self.role, settings, log)
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
    async def ask(cls, server: str, role: str, settings: str, log: BinaryIO) -> "ForkedChild":
        """Raises `OSError` or `TimeoutError` where no server of that name forks."""
        output, their_output = os.pipe()
        status, their_status = os.pipe()
        their_lifeline, lifeline = os.pipe()
        given = os.memfd_create("settings")
        theirs = [given, their_output, log.fileno(), their_status, their_lifeline]
        try:
            os.write(given, settings.encode())
            os.lseek(given, 0, os.SEEK_SET)
            request = json.dumps({"role": role, "environment": dict(environment())}).encode()
            pid = await asyncio.to_thread(_exchange, server, request, theirs)
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
