"""The process of a node that only hosts ranks of a worker which another node leads."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog

from pdserve.config.processes import WorkerSettings
from pdserve.domain.errors import LocalFault, RankLost
from pdserve.engine.ranks.channel import SILENT_S, RankChannel
from pdserve.engine.ranks.crew import PreparedRanks
from pdserve.engine.ranks.forking import REAP_S
from pdserve.engine.ranks.frames import Message

log = structlog.get_logger(__name__)


async def host_ranks(
    settings: WorkerSettings,
    prepared: PreparedRanks,
    on_ready: Callable[[], None],
    stop: asyncio.Event,
) -> None:
    """Until the worker ends; when told to stop, have its leader stop first.

    `on_ready` is called once the whole worker is ready. Raises `LocalFault` if the leader refuses a
    rank, and `RankLost` with the reason if one of those here ends on its own.
    """
    ranks = prepared.local.ranks
    loop = asyncio.get_running_loop()
    ready, ended = ({each.rank: asyncio.Event() for each in ranks} for _ in range(2))
    over: asyncio.Future[None] = loop.create_future()
    channels: list[RankChannel] = []

    def lose(rank: int, why: str) -> None:
        if not ended[rank].is_set() and not over.done():
            why = prepared.local.how_it_ended(rank, within_s=SILENT_S / 4) or why
            log.error("worker.lost", why=f"rank {rank} {why}")
            over.set_exception(RankLost(f"rank {rank} {why}"))

    def listen(rank: int, channel: RankChannel) -> None:
        async def is_ready(_: Message) -> None:
            channel.expect_quick()
            ready[rank].set()

        async def has_ended(_: Message) -> None:
            ended[rank].set()

        async def has_failed(message: Message) -> None:
            if not over.done():
                over.set_exception(LocalFault(f"rank {rank}: {message.fields['why']}"))

        channel.on_lost = lambda why: lose(rank, why)
        for name, handler in (("ready", is_ready), ("ended", has_ended), ("failed", has_failed)):
            channel.handle(name, handler)

    try:
        for each in ranks:
            channel = await RankChannel.open(each.connection, f"rank {each.rank}", each.pid)
            channels.append(channel)
            listen(each.rank, channel)
        if await _all(ready, over, stop):
            on_ready()
            if not await _all(ended, over, stop):
                for channel in channels:
                    channel.tell("stop")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(settings.timers.drain_s + SILENT_S):
                        await _all(ended, over, asyncio.Event())
    finally:
        for channel in channels:
            await channel.close()
        prepared.local.kill()
        prepared.local.reap(REAP_S)


async def _all(
    events: dict[int, asyncio.Event], over: asyncio.Future[None], stop: asyncio.Event
) -> bool:
    """Wait for all events, False if `stop` came first; raises what `over` is to raise."""
    every = asyncio.ensure_future(asyncio.gather(*(each.wait() for each in events.values())))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        ends: list[asyncio.Future[Any]] = [every, stopped, over]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if over.done():
            over.result()
        return every.done()
    finally:
        stopped.cancel()
        every.cancel()
        await asyncio.gather(every, stopped, return_exceptions=True)
