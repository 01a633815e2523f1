"""`pdserve status` and `pdserve models`: what the router says of the cluster."""

import asyncio
import dataclasses
from collections.abc import Mapping

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pdserve.cli.plain_json import json_text
from pdserve.cli.tables import titled_table
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.domain.latency import LiveSteps
from pdserve.domain.messages import ClusterState, SloState, WorkerHello, WorkerState

WATCH_S = 1.0
WIDE_COLUMNS = 112


async def show_status(address: str, *, watch: bool, as_json: bool) -> None:
    """Print the state once, or every second until interrupted. Raises `PdserveError`."""
    async with AdminClient(address) as admin:
        if as_json:
            await _print_json(admin, watch=watch)
        else:
            await _print_tables(admin, watch=watch)


async def _print_json(admin: AdminClient, *, watch: bool) -> None:
    while True:
        print(json_text(state_as_json(await admin.cluster_state())), flush=True)
        if not watch:
            return
        await asyncio.sleep(WATCH_S)


async def _print_tables(admin: AdminClient, *, watch: bool) -> None:
    console = plain_console()
    is_wide = console.width >= WIDE_COLUMNS
    shown = render_state(await admin.cluster_state(), is_wide=is_wide)
    if not watch:
        console.print(shown)
        return
    with Live(shown, console=console, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(WATCH_S)
            shown = render_state(await admin.cluster_state(), is_wide=is_wide)
            live.update(shown, refresh=True)


async def show_models(address: str, *, as_json: bool) -> None:
    """Print the models served. Raises `PdserveError`."""
    async with InferenceClient(address) as client:
        models = await client.list_models()
    if as_json:
        print(json_text([dataclasses.asdict(model) for model in models]))
        return
    table = titled_table("", "model", "context (tokens)", "vocabulary")
    for model in models:
        table.add_row(model.name, f"{model.max_context_tokens:,}", f"{model.vocab_size:,}")
    plain_console().print(table)


def render_state(state: ClusterState, *, is_wide: bool = True) -> Group:
    """The router, its SLO classes if any, and the workers; `is_wide` adds addresses."""
    lines = [
        f"{state.router_id} at {state.public_address}, model {state.model_name}, "
        f"up {_duration(state.uptime_s)}",
        f"requests: {state.num_in_flight} in flight, {state.num_completed} completed, "
        f"{state.num_failed} failed, {state.num_cancelled} cancelled, {state.num_refused} refused",
    ]
    slo = [_slo_table(state.slo)] if state.slo else []
    if not state.workers:
        return Group(*lines, *slo, "no worker is registered")
    legend = "KV blocks: free + reserved + held + pinned = total"
    corrupt = [
        f"{worker.hello.worker_id} read {worker.load.num_corrupt_blocks} KV blocks that did not "
        "match their digests; none was used"
        for worker in state.workers
        if worker.load.num_corrupt_blocks
    ]
    workers = _worker_table(state.workers, is_wide=is_wide)
    steps = _step_table(state.workers, is_wide=is_wide)
    paths = (
        [_path_table(state.workers)] if any(each.load.kv_paths for each in state.workers) else []
    )
    return Group(*lines, *slo, workers, legend, steps, *paths, *corrupt)


def _slo_table(classes: tuple[SloState, ...]) -> Table:
    """Attainment by class; a request that broke both promises is both late and slow."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("class")
    table.add_column("TTFT, TPOT, target", no_wrap=True)
    for name in ("attained", "requests", "late", "slow", "failed", "refused"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in classes:
        counts = (
            each.num_judged,
            each.num_missed_ttft + each.num_missed_both,
            each.num_missed_tpot + each.num_missed_both,
            each.num_failed,
            each.num_refused,
        )
        table.add_row(
            escape(each.name),
            f"{_brief(each.ttft_s)}, {_brief(each.tpot_s)}, {each.target:.4g}",
            "-" if each.attainment is None else f"{each.attainment:.1%}",
            *map(str, counts),
        )
    return table


def _brief(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"


def state_as_json(state: ClusterState) -> dict[str, object]:
    """Plain values; hashes in hexadecimal."""
    plain = _plain(dataclasses.asdict(state))
    assert isinstance(plain, dict)
    return plain


def _worker_table(workers: tuple[WorkerState, ...], *, is_wide: bool) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in ("worker", "health"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting", "free", "reserved", "held", "pinned", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("heard", justify="right", no_wrap=True)
        table.add_column("address", no_wrap=True)
        table.add_column("pid", justify="right", no_wrap=True)
    for worker in _sorted(workers):
        load, kv = worker.load, worker.load.kv
        counts = (load.num_running, load.num_waiting)
        blocks = (kv.free, kv.reserved, kv.held, kv.pinned, kv.total)
        about = (f"{worker.silence_s:.1f} s ago", worker.hello.address, str(worker.hello.pid))
        table.add_row(
            worker.hello.worker_id,
            worker.health,
            *map(str, (*counts, *blocks)),
            *(about if is_wide else ()),
        )
    return table


def _step_table(workers: tuple[WorkerState, ...], *, is_wide: bool) -> Table:
    """What the router takes steps to cost, beside what each worker measured of its last ones.

    `is_wide` adds ranks and devices where there is anything but one rank on the CPU.
    """
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("step times", no_wrap=True)
    for name in ("each step", "prompt token", "request", "1k context", "prefill", "decode"):
        table.add_column(name, justify="right", no_wrap=True)
    has_ranks = is_wide and any(_ranks(worker.hello) != ("1", "cpu") for worker in workers)
    for name in ("ranks", "device") if has_ranks else ():
        table.add_column(name, justify="right", no_wrap=True)
    for worker in _sorted(workers):
        times, load = worker.coefficients, worker.load
        table.add_row(
            worker.hello.worker_id,
            *map(
                _step_time,
                (
                    times.fixed_s,
                    times.prefill_token_s,
                    times.decode_token_s,
                    1000 * times.decode_context_token_s,
                ),
            ),
            _slowness(worker.hello, load.prefill_steps),
            _slowness(worker.hello, load.decode_steps),
            *(_ranks(worker.hello) if has_ranks else ()),
        )
    return table


def _path_table(workers: tuple[WorkerState, ...]) -> Table:
    """How each decode worker reads the KV of those that read prompts for it."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in ("KV read by", "from", "transport"):
        table.add_column(name, no_wrap=True)
    for name in ("moved", "skipped", "retried", "fallbacks"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    for worker in _sorted(workers):
        for path in sorted(worker.load.kv_paths, key=lambda path: path.worker_id):
            table.add_row(
                worker.hello.worker_id,
                path.worker_id,
                path.transport,
                _size(path.moved.moved_bytes),
                _size(path.moved.skipped_bytes),
                _size(path.moved.retried_bytes),
                str(path.num_fallbacks),
                escape(path.why),
            )
    return table


def _size(num_bytes: int) -> str:
    """With three digits or four."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.3g} KiB"
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes < 2**34 else f"{num_bytes / 2**30:,.0f} GiB"


def _ranks(hello: WorkerHello) -> tuple[str, str]:
    """How many ranks a worker has, and what each computes on; a timed engine has none to show."""
    num_ranks = hello.layout.num_ranks if hello.layout is not None else 1
    device = hello.hardware.partition(",")[0] or "cpu"
    return str(num_ranks), "cpu" if device == "timed" else escape(device)


def _step_time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 0.001 else f"{seconds * 1e6:.3g} us"


def _slowness(hello: WorkerHello, steps: LiveSteps | None) -> str:
    """Live steps over the worker's own first measurement."""
    slowness = steps.slowness(hello.coefficients) if steps is not None else None
    return "-" if slowness is None else f"{slowness:.2f} x"


def _sorted(workers: tuple[WorkerState, ...]) -> list[WorkerState]:
    return sorted(workers, key=lambda worker: (worker.hello.role, worker.hello.worker_id))


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


def plain_console(*, stderr: bool = False) -> Console:
    """Standard output or error; where that is no terminal, wide enough that no cell is cut."""
    console = Console(highlight=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=120)
