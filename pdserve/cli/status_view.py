"""`pdserve status` and `pdserve models`: what the router says of the cluster."""

import asyncio
import dataclasses
import json
from collections.abc import Mapping

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.domain.messages import ClusterState, WorkerState

WATCH_S = 1.0


async def show_status(address: str, *, watch: bool, as_json: bool) -> None:
    """Print the state once, or every second until interrupted. Raises `PdserveError`."""
    async with AdminClient(address) as admin:
        state = await admin.cluster_state()
        if as_json:
            print(json.dumps(state_as_json(state)), flush=True)
        elif not watch:
            _console().print(render_state(state))
        if not watch:
            return
        with Live(render_state(state), console=_console(), auto_refresh=False) as live:
            while True:
                await asyncio.sleep(WATCH_S)
                state = await admin.cluster_state()
                if as_json:
                    print(json.dumps(state_as_json(state)), flush=True)
                else:
                    live.update(render_state(state), refresh=True)


async def show_models(address: str, *, as_json: bool) -> None:
    """Print the models served. Raises `PdserveError`."""
    async with InferenceClient(address) as client:
        models = await client.list_models()
    if as_json:
        print(json.dumps([dataclasses.asdict(model) for model in models]))
        return
    table = Table(box=box.SIMPLE)
    table.add_column("model")
    table.add_column("context (tokens)", justify="right")
    table.add_column("vocabulary", justify="right")
    for model in models:
        table.add_row(model.name, f"{model.max_context_tokens:,}", f"{model.vocab_size:,}")
    _console().print(table)


def render_state(state: ClusterState) -> Group:
    """A line about the router and a table of the workers."""
    lines = [
        f"{state.router_id} at {state.public_address}, model {state.model_name}, "
        f"up {_duration(state.uptime_s)}",
        f"requests: {state.num_in_flight} in flight, {state.num_completed} completed, "
        f"{state.num_failed} failed, {state.num_cancelled} cancelled, {state.num_refused} refused",
    ]
    if not state.workers:
        return Group(*lines, "no worker is registered")
    return Group(*lines, _worker_table(state.workers))


def state_as_json(state: ClusterState) -> dict[str, object]:
    """Plain values; hashes in hexadecimal."""
    plain = _plain(dataclasses.asdict(state))
    assert isinstance(plain, dict)
    return plain


def _worker_table(workers: tuple[WorkerState, ...]) -> Table:
    table = Table(box=box.SIMPLE, caption="KV blocks: free + reserved + held + pinned = total")
    for name in ("worker", "health"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting", "free", "reserved", "held", "pinned", "total"):
        table.add_column(name, justify="right")
    table.add_column("heard", justify="right")
    table.add_column("address", no_wrap=True)
    table.add_column("pid", justify="right")
    for worker in sorted(workers, key=lambda worker: (worker.hello.role, worker.hello.worker_id)):
        load, kv = worker.load, worker.load.kv
        counts = (load.num_running, load.num_waiting)
        blocks = (kv.free, kv.reserved, kv.held, kv.pinned, kv.total)
        table.add_row(
            worker.hello.worker_id,
            worker.health,
            *map(str, (*counts, *blocks)),
            f"{worker.silence_s:.1f} s ago",
            worker.hello.address,
            str(worker.hello.pid),
        )
    return table


def _plain(value: object) -> object:
    match value:
        case bytes():
            return value.hex()
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _console() -> Console:
    """Where there is no terminal, wide enough that no cell is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
