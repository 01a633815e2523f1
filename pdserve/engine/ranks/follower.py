"""A rank other than 0: it does what rank 0 says, and dies with it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import structlog
import uvloop

from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.errors import LocalFault, PdserveError, RankLost
from pdserve.domain.layout import KvLayout
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.contract import Engine
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.opening import limits_of
from pdserve.engine.ranks.batch_codec import batch_of, drawn_message
from pdserve.engine.ranks.channel import CLOSED, SILENT_S, RankChannel
from pdserve.engine.ranks.frames import Message
from pdserve.engine.ranks.joining import JOIN_S, join_leader, plan_fields
from pdserve.engine.ranks.ranked_kv import own_store
from pdserve.engine.ranks.service import LoadPart, OpenRankService, RankParts
from pdserve.observe.log_sinks import RotatingFile
from pdserve.observe.logging import flush_logs, process_log

log = structlog.get_logger(__name__)

EXIT_FAILED = 1
DIES_ALONE_S = 2.0
"""A rank that failed ends by itself if rank 0 has not ended it so long after."""


def run_rank(
    rank: int,
    connection: socket.socket,
    *,
    settings: WorkerSettings,
    files: ModelFiles,
    load: LoadPart,
    services: Sequence[OpenRankService],
) -> None:
    """The whole life of a rank process; `connection` leads to the process that forked it."""
    place = RankPlace(rank=rank, tp=settings.engine.tp, pp=settings.engine.pp)
    with process_log(level=settings.log_level, file=_log_file(settings)):
        structlog.contextvars.bind_contextvars(worker_id=settings.worker_id, rank=rank)
        cpus = settings.cpus_of_rank(rank % settings.num_local_ranks)
        if cpus and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)
        follower = Follower(settings, files, place, load, services)
        uvloop.run(follower.run(connection))
        flush_logs()


def part_settings(settings: WorkerSettings, rank: int) -> EngineSettings:
    """Those of the part of one rank: on GPUs it has one of its own."""
    if settings.engine.device != "cuda":
        return settings.engine
    device = f"cuda:{rank % settings.num_local_ranks}"
    return settings.engine.model_copy(update={"device": device})


class Follower:
    """Answers rank 0: `group`, `load`, `serve`, then `step` after `step`, until it says `end`."""

    def __init__(
        self,
        settings: WorkerSettings,
        files: ModelFiles,
        place: RankPlace,
        load: LoadPart,
        services: Sequence[OpenRankService],
    ) -> None:
        self._settings = settings
        self._files = files
        self._place = place
        self._load = load
        self._services = services
        self._group: Any = None
        self._engine: Engine | None = None
        self._parent = os.getppid()
        self._end = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def run(self, connection: socket.socket) -> None:
        async with self._stack:
            parent = await RankChannel.open(connection, "rank 0", self._parent)
            self._stack.push_async_callback(parent.close)
            if self._settings.ranks.node == 0:
                self._leader = parent
            else:
                parent.peer = "the host of this rank"
                parent.on_lost = self._lose_parent
                try:
                    self._leader = await self._join(parent)
                except LocalFault as fault:
                    await parent.ask("failed", Message({"why": fault.message}), deadline_s=SILENT_S)
                    return
            self._leader.on_lost = self._lose_leader
            for name, handler in (
                ("group", self._make_group),
                ("load", self._load_part),
                ("serve", self._serve),
                ("step", self._step),
                ("end", self._end_in_order),
            ):
                self._leader.handle(name, handler)
            self._host = None if self._leader is parent else parent
            await self._leader.ask("here", deadline_s=JOIN_S)
            await self._end.wait()
            if self._host is not None:
                await self._host.ask("ended", deadline_s=SILENT_S)
        if self._engine is not None:
            self._engine.close()

    async def _join(self, host: RankChannel) -> RankChannel:
        async def stop(_: Message) -> None:
            leader.tell("stop")

        plan = plan_fields(self._settings, self._files)
        leader = await join_leader(self._settings, plan, self._place.rank)
        self._stack.push_async_callback(leader.close)
        host.handle("stop", stop)
        return leader

    async def _make_group(self, message: Message) -> None:
        from pdserve.engine.ranks.meeting import meet

        self._group = await asyncio.to_thread(
            meet, self._place, part_settings(self._settings, self._place.rank), **message.fields
        )

    async def _load_part(self, _: Message) -> Message:
        engine = await asyncio.to_thread(
            self._load,
            self._files,
            part_settings(self._settings, self._place.rank),
            limits_of(self._settings),
            self._group,
        )
        self._engine = engine
        return part_message(engine)

    async def _serve(self, message: Message) -> None:
        """All ranks have loaded: from here on each of them is quick, or lost."""
        if self._engine is not None:
            self._group.set_deadline(message.fields["step_s"])
            parts = RankParts(
                settings=self._settings,
                place=self._place,
                engine=self._engine,
                channel=self._leader,
            )
            for open_service in self._services:
                handlers = await self._stack.enter_async_context(open_service(parts))
                for name, handler in handlers.items():
                    self._leader.handle(name, handler)
        self._leader.expect_quick()
        if self._host is not None:
            self._host.expect_quick()
            await self._host.ask("ready", deadline_s=SILENT_S)
        log.info("rank.ready")

    async def _step(self, message: Message) -> Message:
        assert self._engine is not None
        try:
            result = await self._engine.step(batch_of(message))
        except RankLost:
            self._end_soon()
            raise
        except Exception as error:
            log.error("step.failed", exc_info=error)
            self._end_soon()
            why = error.message if isinstance(error, PdserveError) else type(error).__name__
            raise LocalFault(f"{why} in a step") from None
        return drawn_message(result.sampled if self._place.draws else ())

    async def _end_in_order(self, _: Message) -> None:
        self._leader.on_lost = lambda why: None
        self._end.set()

    def _end_soon(self) -> None:
        """A step that failed here cannot be made good: rank 0 says why, and ends the worker."""
        loop = asyncio.get_running_loop()
        loop.call_later(DIES_ALONE_S, self._lose, "rank 0", "did not end a worker that failed")

    def _lose_leader(self, why: str) -> None:
        self._lose("rank 0", why, is_parent=self._settings.ranks.node == 0)

    def _lose_parent(self, why: str) -> None:
        self._lose("the host of this rank", why, is_parent=True)

    def _lose(self, peer: str, why: str, *, is_parent: bool = False) -> NoReturn:
        """Say why and end. A parent that was stopped would hold ports and requests until it is
        killed; one that closed its connection is about to end, and has words to say.
        """
        log.error("worker.lost", why=f"{peer} {why}")
        flush_logs()
        if is_parent and why != CLOSED and os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)
        os._exit(EXIT_FAILED)


def part_message(engine: Engine) -> Message:
    """What a rank loaded, for rank 0 to compare."""
    return Message(
        {
            "model_hash": engine.spec.model_hash.hex(),
            "layout": layout_fields(engine.spec.layout),
            "own_layout": layout_fields(own_store(engine.kv).layout),
        }
    )


def layout_fields(layout: KvLayout) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(layout)))


def _log_file(settings: WorkerSettings) -> RotatingFile | None:
    """The worker's own, which rank 0 keeps within its limits: this process never renames it."""
    if not settings.log_file:
        return None
    return RotatingFile(Path(settings.log_file), max_bytes=sys.maxsize, num_files=1, is_stderr=True)
