"""Pods without a kubelet: namespaces of the kernel, made and left without a trace.

    node: a network namespace with a bridge (10.77.0.1, where the kubelet would be)
      └── pod: a network namespace on the bridge and a mount namespace of its own
            /etc     laid over with resolv.conf and the ConfigMaps' files, read-only
            /tmp ... memory, as large as the emptyDir
            /        read-only

Each namespace is held by one sleeping process; with it the kernel removes everything. Works for
root, and for users who may make user namespaces.
"""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.support.network_policies import Endpoint

REPO = Path(__file__).parents[2]
NODE_IP = "10.77.0.1"
TOOLS = ("unshare", "nsenter", "ip", "ss", "mount")
BIN = Path(sys.executable).parent
RUN_FROM = (REPO, Path(sys.prefix), Path(sys.base_prefix))


@functools.cache
def why_no_pods() -> str:
    """Why this machine cannot make namespaces; empty where it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = "ip link add br0 type bridge && mount -t overlay none -o lowerdir=/tmp:/etc /etc"
    done = subprocess.run(
        [*_unshare(with_user=True), "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() if done.returncode else ""


def _memory_mount(path: str, size: str) -> list[str]:
    """Shell lines: memory at `path`, through which what processes run from still shows."""
    kept = [folder for folder in RUN_FROM if folder.is_relative_to(path)]
    memory = f"mount -t tmpfs -o size={size} none {path}"
    if not kept:
        return [memory]
    # The kernel keeps what is covered reachable through a descriptor that was opened before.
    opened = [f"exec {number}<{shlex.quote(str(folder))}" for number, folder in enumerate(kept, 3)]
    shown = [
        f"mkdir -p {shlex.quote(str(folder))} && "
        f"mount -c --bind /proc/self/fd/{number} {shlex.quote(str(folder))}"
        for number, folder in enumerate(kept, 3)
    ]
    closed = [f"exec {number}<&-" for number in range(3, 3 + len(kept))]
    return [*opened, memory, *shown, *closed]


def _unshare(*, with_user: bool) -> list[str]:
    user = ["--user", "--map-root-user"] if with_user and os.geteuid() != 0 else []
    return ["unshare", *user, "--net", "--mount", "--propagation", "private"]


class Node:
    """Owns all namespaces; leaving its block ends every process in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pauses: list[subprocess.Popen[str]] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._num_pods = 0

    def __enter__(self) -> Self:
        script = (
            "ip link set lo up && ip link add br0 type bridge && "
            f"ip addr add {NODE_IP}/24 dev br0 && ip link set br0 up"
        )
        self._pause(_unshare(with_user=True), script)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in (*reversed(self._processes), *reversed(self._pauses)):
            process.kill()
        for process in (*self._processes, *self._pauses):
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def pod(
        self,
        name: str,
        *,
        namespace: str,
        labels: Mapping[str, str],
        ports: Mapping[str, int] | None = None,
        etc: Path | None = None,
        memory_mounts: Mapping[str, str] | None = None,
    ) -> "Pod":
        """A pod without a process. `etc` is laid over /etc; `memory_mounts`: path to size."""
        self._num_pods += 1
        ip = f"10.77.0.{self._num_pods + 9}"
        lines = ["ip link set lo up"]
        if etc is not None:
            lines.append(f"mount -t overlay none -o lowerdir={etc}:/etc /etc")
        for path, size in (memory_mounts or {}).items():
            lines += _memory_mount(path, size)
        if etc is not None:
            lines.append("mount -o remount,bind,ro /")
        pause = self._pause([*self.enter(), *_unshare(with_user=False)], " && ".join(lines))
        plug = f"veth{self._num_pods}"
        self.run(f"ip link add {plug} type veth peer name eth0 netns {pause.pid}")
        self.run(f"ip link set {plug} master br0 up")
        pod = Pod(
            self,
            pause.pid,
            Endpoint(name=name, ip=ip, namespace=namespace, labels=labels, ports=ports or {}),
        )
        pod.run("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true")
        pod.run(f"ip addr add {ip}/24 dev eth0 && ip link set eth0 up")
        return pod

    def enter(self, pid: int | None = None) -> list[str]:
        """The command that goes into the node, or into the namespaces of `pid`."""
        user = ["--user", "--preserve-credentials"] if os.geteuid() != 0 else []
        target = pid if pid is not None else self._pauses[0].pid
        return ["nsenter", "--target", str(target), *user, "--net", "--mount"]

    def run(self, script: str, *, pid: int | None = None) -> str:
        """Run a shell line to its end; fails with what it said."""
        done = subprocess.run(
            [*self.enter(pid), "sh", "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    def start(
        self,
        command: Sequence[str],
        *,
        pid: int | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] = subprocess.PIPE,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process in the node, or in the namespaces of `pid`."""
        process = subprocess.Popen(
            [*self.enter(pid), *command],
            stdout=stdout,
            stderr=stderr,
            text=True,
            cwd=REPO,
            env={"PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})},
        )
        self._processes.append(process)
        return process

    def check(self, command: Sequence[str]) -> int:
        """Exit status of a command that runs in the node, as the kubelet's probes do."""
        env = {"PATH": f"{BIN}:{os.environ['PATH']}"}
        return subprocess.run(
            [*self.enter(), *command], capture_output=True, cwd=REPO, env=env, check=False
        ).returncode

    def _pause(self, command: Sequence[str], script: str) -> subprocess.Popen[str]:
        """A process that holds new namespaces once they are set up as `script` says."""
        pause = subprocess.Popen(
            [*command, "sh", "-c", f"{script} && echo ready && exec sleep infinity"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._pauses.append(pause)
        assert pause.stdout is not None
        assert pause.stderr is not None
        if pause.stdout.readline() != "ready\n":
            raise AssertionError(f"{script}: {pause.stderr.read()}")
        pause.stderr.close()
        return pause


class Pod:
    """Namespaces of one pod, and the process that was started in them."""

    def __init__(self, node: Node, pid: int, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.process: subprocess.Popen[str] | None = None
        self._node = node
        self._pid = pid

    @property
    def name(self) -> str:
        return self.endpoint.name

    @property
    def log_path(self) -> Path:
        return self._node.folder / f"{self.name}.log"

    def run(self, script: str) -> str:
        return self._node.run(script, pid=self._pid)

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start the pod's process; what it says goes into its log."""
        with self.log_path.open("ab") as log:
            self.process = self._node.start(
                command, pid=self._pid, env=env, stdout=log, stderr=subprocess.STDOUT
            )

    def ask(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Exit status and output of a command that runs in the pod to its end."""
        process = self._node.start(command, pid=self._pid, env=env, stderr=subprocess.STDOUT)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def apply_rules(self, rules: str) -> None:
        """Load nftables rules in the pod's network."""
        subprocess.run(
            [*self._node.enter(self._pid), "nft", "-f", "-"],
            input=rules,
            text=True,
            check=True,
        )


def write_zone(path: Path, zone: Mapping[str, Sequence[str]]) -> None:
    """What the DNS stub answers from now on; replaced at once, never half written."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({name: list(addresses) for name, addresses in zone.items()}))
    new.rename(path)
