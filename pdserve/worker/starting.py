"""Starting the process of a worker: its ranks are forked before its event loop exists."""

import asyncio
import contextlib
import importlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import structlog

from pdserve.config.processes import WorkerSettings
from pdserve.domain.addresses import split_address
from pdserve.domain.errors import LocalFault
from pdserve.engine.contract import Engine
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.opening import limits_of, load_rank_part, open_engine
from pdserve.engine.ranks.crew import PreparedRanks, gathered
from pdserve.engine.ranks.follower import run_rank
from pdserve.engine.ranks.forking import REAP_S, fork_ranks
from pdserve.engine.ranks.host import host_ranks
from pdserve.engine.ranks.joining import JOIN_S
from pdserve.engine.ranks.service import LoadPart, OpenRankService
from pdserve.rpc.process import OnReady, ServeProcess, run_process

_HEAVY_IMPORTS = ("pdserve.engine.torch_engine", "transformers.models.auto.modeling_auto")
"""What every rank needs: imported once before the fork, not once by each."""

ServeWorker = Callable[
    [WorkerSettings, OnReady, asyncio.Event, PreparedRanks | None], Awaitable[None]
]


def run_worker(
    serve: ServeWorker,
    services: Sequence[OpenRankService],
    doc: str,
    load: LoadPart = load_rank_part,
) -> None:
    """The whole `__main__` of a worker, or of a node that only hosts ranks of one.

    `services` are what its ranks other than 0 do besides computing.
    """

    def prepare(settings: WorkerSettings) -> ServeProcess[WorkerSettings]:
        prepared = prepare_ranks(settings, services, load)

        async def run(settings: WorkerSettings, on_ready: OnReady, stop: asyncio.Event) -> None:
            if settings.ranks.node > 0:
                assert prepared is not None
                structlog.contextvars.bind_contextvars(worker_id=settings.worker_id)
                await host_ranks(settings, prepared, on_ready, stop)
            else:
                await serve(settings, on_ready, stop, prepared)

        return run

    run_process(WorkerSettings, prepare, doc)


def prepare_ranks(
    settings: WorkerSettings,
    services: Sequence[OpenRankService] = (),
    load: LoadPart = load_rank_part,
) -> PreparedRanks | None:
    """Fork what this process hosts besides rank 0, and listen for ranks of other nodes.

    None for a worker of one process. Call it before any thread and event loop exists. Raises
    `LocalFault` if the model cannot be opened, or the port of `ranks.leader` cannot be had.
    """
    num_local, node = settings.num_local_ranks, settings.ranks.node
    is_timed = settings.engine.engine == "timed"
    num_nodes = settings.ranks.num_nodes(settings.engine.num_ranks)
    if num_nodes == 1 and (is_timed or settings.engine.num_ranks == 1):
        return None
    files = ModelFiles.open(settings.engine.model, settings.engine.override_config)
    first = node * num_local
    ranks = range(max(1, first), first + num_local)
    if is_timed:
        ranks = range(first, first + (1 if node else 0))
    if not is_timed:
        for module in _HEAVY_IMPORTS:
            _import(module)

    def run(rank: int, connection: socket.socket) -> None:
        run_rank(rank, connection, settings=settings, files=files, load=load, services=services)

    local = fork_ranks(ranks, run)
    try:
        listener = _listen(settings) if node == 0 and num_nodes > 1 else None
    except LocalFault:
        local.kill()
        local.reap(REAP_S)
        raise
    return PreparedRanks(files=files, load=load, local=local, listener=listener)


@contextlib.asynccontextmanager
async def opened_engine(
    settings: WorkerSettings,
    prepared: PreparedRanks | None,
    on_stop: Callable[[], None] = lambda: None,
) -> AsyncIterator[Engine]:
    """The engine of a worker, of all its ranks, until the block ends.

    `on_stop` is called when another host of the worker is told to stop.
    """
    async with contextlib.AsyncExitStack() as stack:
        if prepared is None:
            engine: Engine = open_engine(settings.engine, limits_of(settings))
            stack.callback(engine.close)
        else:
            crew = await stack.enter_async_context(gathered(settings, prepared, on_stop))
            if settings.engine.engine == "timed":
                engine = open_engine(settings.engine)
                stack.callback(engine.close)
                await crew.start(deadline_s=JOIN_S, step_s=settings.timers.stuck_s)
            else:
                from pdserve.engine.ranks.ranked_engine import loaded

                engine = await stack.enter_async_context(loaded(crew))
        yield engine


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LocalFault(
            f"engine: torch needs {error.name}; install the extra: pip install 'pdserve[worker]'"
        ) from None


def _listen(settings: WorkerSettings) -> socket.socket:
    """At the port of `ranks.leader`, on this host's own address."""
    if settings.ranks.leader is None:
        raise LocalFault("ranks.leader: where the other nodes find this one must be given")
    _, port = split_address(settings.ranks.leader)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, port), family=family, backlog=128)
    except OSError as error:
        raise LocalFault(
            f"ranks.leader: cannot listen at {settings.host}:{port}: {error.strerror}"
        ) from None
