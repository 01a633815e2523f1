"""`pdserve up`: start, say so, watch, drain."""

import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table

from deploy.local import LocalCluster
from deploy.processes import describe_exit
from pdserve.cli.problems import ClusterFailed
from pdserve.cli.running import EXIT_INTERRUPTED
from pdserve.config.base import parse_assignment
from pdserve.config.cluster import ClusterSettings, read_cluster_settings
from pdserve.domain.errors import PdserveError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFAULT_PORTS = (7450, 7451)


def settings_of(
    path: Path | None, flags: Mapping[str, object], assignments: Sequence[str]
) -> ClusterSettings:
    """The file's settings, then `assignments` (name=value), then the flags that were given."""
    given = dict(map(parse_assignment, assignments))
    given |= {name: value for name, value in flags.items() if value is not None}
    return read_cluster_settings(path, given)


def run_up(settings: ClusterSettings, *, as_json: bool) -> None:
    """Serve until a signal or the end of the cluster; raises `PdserveError` for a failure."""
    try:
        asyncio.run(_Up(settings, as_json=as_json).run())
    except asyncio.CancelledError:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except PdserveError as error:
        if as_json:
            print(json.dumps({"ready": False, "error": error.message}), flush=True)
        raise


class _Up:
    """One run of the command: owns the reaction to signals and what is said on stderr."""

    def __init__(self, settings: ClusterSettings, *, as_json: bool) -> None:
        self._settings = settings
        self._as_json = as_json
        self._console = Console(stderr=True, highlight=False)
        self._stop = asyncio.Event()
        self._is_forced = False
        self._num_processes = 1 + settings.prefill.replicas + settings.decode.replicas
        self._status = self._console.status("starting")
        self._cluster = LocalCluster.start(settings, report=self._report)

    async def run(self) -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, main.cancel)  # while starting: take all down
        started = loop.time()
        with self._status:
            await self._cluster.__aenter__()
        self._say_ready(loop.time() - started)
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        await self._serve()

    async def _serve(self) -> None:
        """Leave the cluster's block by its rules, whatever ends the watch."""
        try:
            await self._watch()
        except BaseException as error:
            await self._cluster.__aexit__(type(error), error, error.__traceback__)
            raise
        await self._cluster.__aexit__(None, None, None)
        self._print("stopped; nothing is left running")
        if self._is_forced:
            raise typer.Exit(EXIT_INTERRUPTED)

    async def _watch(self) -> None:
        """Until a signal; raises `ClusterFailed` once the cluster cannot serve."""
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while not stopped.done():
                ended = asyncio.create_task(self._cluster.next_exit())
                await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not ended.done():
                    ended.cancel()
                    break
                process, code = ended.result()
                self._on_exit(process.name, code)
        finally:
            stopped.cancel()

    def _on_exit(self, name: str, code: int) -> None:
        process = self._cluster.process(name)
        happened = f"{name} {describe_exit(code)}"
        log = f"the end of {process.log_path}:\n{process.last_words()}"
        if process.role == "router":
            raise ClusterFailed(f"{happened}; the cluster is down; {log}")
        if not any(each.role == "decode" and each.is_running for each in self._cluster.workers):
            raise ClusterFailed(f"{happened}; no decode worker is left; {log}")
        self._print(f"{happened}; the cluster goes on without it; {log}")

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._print("stopping at once")
            self._is_forced = True
            self._cluster.kill()
            return
        limit_s = self._settings.timers.drain_s
        self._print(
            f"draining: requests may finish for up to {limit_s:g} s; Ctrl-C again stops at once"
        )
        self._stop.set()

    def _say_ready(self, elapsed_s: float) -> None:
        if self._as_json:
            print(json.dumps(self._as_dict(elapsed_s)), flush=True)
            return
        # Names and paths may hold brackets, which are no markup.
        self._console.print(self._as_table(elapsed_s), markup=False)

    def _as_dict(self, elapsed_s: float) -> dict[str, object]:
        cluster = self._cluster
        return {
            "ready": True,
            "address": cluster.public_address,
            "internal_address": cluster.internal_address,
            "start_s": round(elapsed_s, 3),
            "log_dir": str(cluster.log_dir),
            "processes": [
                {
                    "name": each.name,
                    "role": each.role,
                    "pid": each.pid,
                    "address": each.ready.internal_address if each.ready else "",
                    "num_blocks": each.num_blocks,
                }
                for each in cluster.processes
            ],
        }

    def _as_table(self, elapsed_s: float) -> Group:
        cluster = self._cluster
        table = Table(box=box.SIMPLE)
        table.add_column("process")
        table.add_column("role")
        table.add_column("pid", justify="right")
        table.add_column("address")
        table.add_column("KV blocks", justify="right")
        for each in cluster.processes:
            address = each.ready.internal_address if each.ready else ""
            blocks = f"{each.num_blocks:,}" if each.num_blocks else ""
            table.add_row(each.name, each.role, str(each.pid), address, blocks)
        public, internal = cluster.public_address, cluster.internal_address
        ports = (self._settings.router.port, self._settings.router.internal_port)
        flags = ["", ""] if ports == DEFAULT_PORTS else [f" -a {public}", f" -a {internal}"]
        prompt = shlex.quote("def read_lines(path):")
        return Group(
            table,
            f"ready in {elapsed_s:.1f} s; clients: {public}; logs: {cluster.log_dir}",
            f"try: pdserve generate {prompt}{flags[0]}",
            f"     pdserve status{flags[1]}",
            "Ctrl-C drains and stops",
        )

    def _report(self, text: str) -> None:
        num_ready = sum(process.ready is not None for process in self._cluster.processes)
        self._status.update(f"{num_ready} of {self._num_processes} processes serve; {text}")

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
