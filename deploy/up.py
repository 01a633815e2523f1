"""`pdserve up`: start, say so, watch, drain."""

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict

import typer
from rich import box
from rich.console import Group
from rich.table import Table

from deploy.backend import Cluster, Report
from deploy.deployment import Deployment
from deploy.runs import Run, noted_run
from pdserve.cli.output import lasting_output
from pdserve.cli.running import EXIT_INTERRUPTED
from pdserve.cli.status_view import plain_console
from pdserve.domain.errors import PdserveError

DEFAULT_ADDRESSES = ("127.0.0.1:7450", "127.0.0.1:7451")


OpenCluster = Callable[[Report], Cluster]
"""A cluster that starts when its block is entered, and tells of its steps."""


def run_up(
    open_cluster: OpenCluster, deployment: Deployment, *, backend: str, as_json: bool
) -> None:
    """Serve until a signal or the end of the cluster; raises `PdserveError` for a failure."""
    # Serving goes on when the terminal is gone, or when nobody reads the pipe.
    with lasting_output():
        up = _Up(open_cluster, deployment, backend=backend, as_json=as_json)
        try:
            asyncio.run(up.run())
        except asyncio.CancelledError:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except PdserveError as error:
            if as_json:
                print(json.dumps({"ready": False, "error": error.message}), flush=True)
            raise


def _stop_signals() -> tuple[signal.Signals, ...]:
    """A terminal that closes stops the cluster, unless `nohup` has asked that it should not."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


class _Up:
    """One run of the command: owns the reaction to signals and what is said on stderr."""

    def __init__(
        self, open_cluster: OpenCluster, deployment: Deployment, *, backend: str, as_json: bool
    ) -> None:
        self._cluster = open_cluster(self._report)
        self._deployment = deployment
        self._backend = backend
        self._as_json = as_json
        self._console = plain_console(stderr=True)
        self._stop = asyncio.Event()
        self._is_forced = False
        self._status = self._console.status("starting")

    async def run(self) -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        for number in _stop_signals():
            loop.add_signal_handler(number, main.cancel)  # while starting: take all down
        for note in self._deployment.notes:
            self._print(f"note: {note}")
        started = loop.time()
        with self._status:
            await self._cluster.__aenter__()
        elapsed_s = loop.time() - started
        for number in _stop_signals():
            loop.add_signal_handler(number, self._on_signal)
        with noted_run(self._as_run(), self._print):
            self._say_ready(elapsed_s)
            await self._serve()

    def _report(self, text: str) -> None:
        """A step of the start."""
        num_processes = 1 + len(self._deployment.workers)
        num_ready = self._cluster.num_serving
        self._status.update(f"{num_ready} of {num_processes} processes serve; {text}")

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
        """Until a signal, or until somebody elsewhere asks for the end."""
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while not stopped.done():
                ended = asyncio.create_task(self._cluster.next_event())
                await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not ended.done():
                    ended.cancel()
                    break
                event = ended.result()
                self._print(event.message)
                if event.asks_stop:
                    self._on_signal()
        finally:
            stopped.cancel()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._print("stopping at once")
            self._is_forced = True
            self._cluster.kill()
            return
        limit_s = self._deployment.drain_s
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

    def _as_run(self) -> Run:
        return Run(
            pid=os.getpid(),
            backend=self._backend,
            address=self._cluster.public_address,
            internal_address=self._cluster.internal_address,
            drain_s=self._deployment.drain_s,
        )

    def _as_dict(self, elapsed_s: float) -> dict[str, object]:
        cluster = self._cluster
        return {
            "ready": True,
            "backend": self._backend,
            "pid": os.getpid(),
            "address": cluster.public_address,
            "internal_address": cluster.internal_address,
            "start_s": round(elapsed_s, 3),
            "log_dir": str(cluster.log_dir),
            "processes": [asdict(row) for row in cluster.rows],
        }

    def _as_table(self, elapsed_s: float) -> Group:
        cluster = self._cluster
        table = Table(box=box.SIMPLE)
        table.add_column("process")
        table.add_column("role")
        table.add_column("pid", justify="right")
        table.add_column("address")
        table.add_column("KV blocks", justify="right")
        table.add_column("metrics")
        # Columns that would be empty or say the same of all are left out.
        extra = {
            "ranks": [str(row.num_ranks) for row in cluster.rows],
            "computes on": [row.device for row in cluster.rows],
            "node": [row.place for row in cluster.rows],
        }
        shown = {name: cells for name, cells in extra.items() if set(cells) - {"", "1"}}
        for name in shown:
            table.add_column(name)
        for row, *cells in zip(cluster.rows, *shown.values(), strict=True):
            blocks = f"{row.num_blocks:,}" if row.num_blocks else ""
            about = (row.name, row.role, str(row.pid), row.address, blocks, row.metrics_address)
            table.add_row(*about, *cells)
        public, internal = cluster.public_address, cluster.internal_address
        is_default = (public, internal) == DEFAULT_ADDRESSES
        flags = ["", ""] if is_default else [f" -a {public}", f" -i {internal}"]
        prompt = shlex.quote("def read_lines(path):")
        return Group(
            table,
            f"ready in {elapsed_s:.1f} s; clients: {public}; logs: {cluster.log_dir}",
            f"try: pdserve generate {prompt}{flags[0]}",
            f"     pdserve status{flags[1]}",
            "Ctrl-C drains and stops",
        )

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
