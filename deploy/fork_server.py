"""A process that has imported what workers need, and forks one for each that asks.

    owner ── one JSON line + 5 descriptors ──▶ fork server ──▶ fork ──▶ worker
      settings, output, log ◀────────────────────────────────────────────┘
      status ◀── exit code, from the server, which is the worker's parent
      lifeline: the owner holds its other end; once that is closed the kernel signals the worker

Importing torch and transformers takes a core four seconds, a fork none. Nothing here starts a
thread, a channel or a CUDA context, so that forking is safe. Only processes of the same user are
heard.
"""

import argparse
import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pdserve.engine.ranks.forking import call_itself, close_all_but

PR_SET_PDEATHSIG = 1
F_SETSIG = 10  # Linux, fcntl(2)
NUM_DESCRIPTORS = 5  # settings, output, log, status, lifeline
MAX_REQUEST_BYTES = 1 << 20
PEER = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED
MODULES = {"prefill": "prefill_worker", "decode": "decode_worker"}


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker that runs: how to see that it ends, and who wants to know how."""

    pid: int
    status: int


def main() -> None:
    """Preload, say so on stdout, serve until the starting process dies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the abstract socket to listen on")
    parser.add_argument("--engine", choices=("torch", "timed"), default="torch")
    arguments = parser.parse_args()
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the starting process is gone")
    preload(arguments.engine)
    if num_threads() > 1:
        sys.exit("the imports started threads: forking would not be safe")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{arguments.name}")
        listener.listen()
        print("ready", flush=True)
        serve(listener)


def preload(engine: Literal["torch", "timed"]) -> None:
    """Import what a worker imports, and open the demo model once: models import as they load."""
    from pdserve.config.processes import CoefficientSettings, EngineSettings
    from pdserve.engine.opening import open_engine

    for module in MODULES.values():
        importlib.import_module(f"{module}.app")
    nothing = CoefficientSettings(fixed_s=0, prefill_token_s=0, decode_token_s=0)
    settings = EngineSettings(num_blocks=1, engine=engine, coefficients=nothing)
    open_engine(settings).close()


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def serve(listener: socket.socket) -> None:
    """Answer requests one by one; reap what ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not listener:
                    _reap(selector, key.fd, key.data)
                elif forked := _accept(listener):
                    pidfd = os.pidfd_open(forked.pid)
                    selector.register(pidfd, selectors.EVENT_READ, forked)


def _reap(selector: selectors.BaseSelector, pidfd: int, forked: Forked) -> None:
    """Tell its owner how it ended."""
    selector.unregister(pidfd)
    os.close(pidfd)
    _, status = os.waitpid(forked.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(forked.status, str(code).encode())
    os.close(forked.status)


def _accept(listener: socket.socket) -> Forked | None:
    """One request; None where it is not ours to serve."""
    connection, _ = listener.accept()
    with connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
        if PEER.unpack(credentials)[1] != os.getuid():
            return None
        connection.settimeout(1.0)
        try:
            data, descriptors, _, _ = socket.recv_fds(
                connection, MAX_REQUEST_BYTES, NUM_DESCRIPTORS
            )
        except OSError:
            return None
        if len(descriptors) != NUM_DESCRIPTORS:
            _close(descriptors)
            return None
        settings, output, log, status, lifeline = descriptors
        pid = os.fork()
        if pid == 0:
            _become(json.loads(data), settings, output, log, lifeline)
        _close((settings, output, log, lifeline))
        try:
            connection.send(str(pid).encode())
        except OSError:
            os.kill(pid, signal.SIGKILL)
        return Forked(pid, status)


def _become(
    request: dict[str, Any], settings: int, output: int, log: int, lifeline: int
) -> NoReturn:
    """Be the worker; never returns to the server's code."""
    try:
        os.setsid()
        for given, number in ((settings, 0), (output, 1), (log, 2)):
            os.dup2(given, number)
        close_all_but(0, 1, 2, lifeline)
        _signal_with(lifeline, request["on_parent_death"])
        os.environ.clear()
        os.environ.update(request["environment"])
        call_itself(f"pdserve-{request['role']}")
        _run_worker(request["role"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:  # noqa: BLE001  the server's loop must not run in the worker
        with contextlib.suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        code = 1
    else:
        code = 0
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run_worker(role: str) -> None:
    from pdserve.worker.starting import run_worker

    module = importlib.import_module(f"{MODULES[role]}.app")
    sys.argv = [MODULES[role], "--settings", "-"]
    run_worker(module.serve, module.RANK_SERVICES, f"{role} worker")


def _signal_with(lifeline: int, number: int) -> None:
    """Have the kernel send this process a signal once the other end is closed."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, F_SETSIG, number)
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_NONBLOCK | fcntl.FASYNC)
    try:
        if os.read(lifeline, 1) == b"":
            os._exit(1)  # it was closed before the kernel was asked
    except BlockingIOError:
        return


def _close(descriptors: Any) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    main()
