"""Rank 0's side of a worker of many ranks: it gathers them, and ends with any of them."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import structlog

from pdserve.config.processes import WorkerSettings
from pdserve.domain.errors import LocalFault, PdserveError, RankLost
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.ranks.channel import CLOSED, RankChannel
from pdserve.engine.ranks.forking import HASTY_REAP_S, REAP_S, LocalRanks
from pdserve.engine.ranks.frames import Message
from pdserve.engine.ranks.joining import HELLO_S, JOIN_S, check_plan, plan_fields
from pdserve.engine.ranks.service import LoadPart
from pdserve.observe.logging import flush_logs

log = structlog.get_logger(__name__)

EXIT_FAILED = 1
REASON_S = 0.5
"""How long a better reason is waited for when all that is known is that some rank was lost."""
ENDS_S = 3.0
"""Ranks that were told to end have ended after this time."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRanks:
    """What a process of a worker had to do for its ranks before its event loop existed."""

    files: ModelFiles
    load: LoadPart
    local: LocalRanks
    listener: socket.socket | None = None  # for the ranks of other nodes


@dataclass(slots=True)
class Crew:
    """The ranks other than 0, once they are there. Any loss among them ends this process.

    `on_stop` is called when one of the hosts is told to stop.
    """

    settings: WorkerSettings
    prepared: PreparedRanks
    on_stop: Callable[[], None]
    channels: dict[int, RankChannel] = field(default_factory=dict)
    hosts: dict[int, str] = field(default_factory=dict)  # how the others reach each rank
    _here: dict[int, asyncio.Event] = field(default_factory=dict)
    _accepting: list[asyncio.Task[None]] = field(default_factory=list)
    _is_ending: bool = False

    @property
    def expected(self) -> Sequence[int]:
        """Ranks that come: all others, or one of each other node if nothing is computed."""
        first = self.settings.num_local_ranks
        if self.settings.engine.engine == "timed":
            return range(first, self.settings.engine.num_ranks, first)
        return range(1, self.settings.engine.num_ranks)

    @property
    def in_order(self) -> list[RankChannel]:
        """To ranks 1, 2, ..."""
        return [self.channels[rank] for rank in sorted(self.channels)]

    @property
    def own_host(self) -> str:
        return self.settings.host if self.prepared.listener else LOOPBACK

    async def gather(self) -> None:
        """Until every rank is here; raises `LocalFault` naming those that are not in time."""
        self._here = {rank: asyncio.Event() for rank in self.expected}
        for each in self.prepared.local.ranks:
            channel = await RankChannel.open(each.connection, f"rank {each.rank}", each.pid)
            self._take(each.rank, channel, self.own_host)
        if self.prepared.listener is not None:
            self._accepting.append(asyncio.create_task(self._accept(self.prepared.listener)))
        try:
            async with asyncio.timeout(JOIN_S):
                for event in self._here.values():
                    await event.wait()
        except TimeoutError:
            missing = [str(rank) for rank, event in self._here.items() if not event.is_set()]
            raise LocalFault(
                f"{len(missing)} of {self.settings.engine.num_ranks} ranks did not come within "
                f"{JOIN_S:g} s: rank {', '.join(missing)}"
            ) from None

    async def ask_all(
        self, name: str, messages: Mapping[int, Message] | Message, *, deadline_s: float
    ) -> dict[int, Message]:
        """Ask every rank at once; the first failure is raised, with the rank in it."""
        ranks = sorted(self.channels)
        questions = [
            self._ask(
                rank,
                name,
                messages if isinstance(messages, Message) else messages[rank],
                deadline_s,
            )
            for rank in ranks
        ]
        return dict(zip(ranks, await asyncio.gather(*questions), strict=True))

    async def _ask(self, rank: int, name: str, message: Message, deadline_s: float) -> Message:
        try:
            return await self.channels[rank].ask(name, message, deadline_s=deadline_s)
        except LocalFault as fault:
            raise LocalFault(f"rank {rank}: {fault.message}") from None
        except RankLost as lost:
            return await self.wait_for_end(rank, lost)

    async def start(self, *, deadline_s: float, step_s: float) -> None:
        """All have loaded what they need: from here on whoever is silent is lost."""
        await self.ask_all("serve", Message({"step_s": step_s}), deadline_s=deadline_s)
        for channel in self.channels.values():
            channel.expect_quick()

    async def wait_for_end(self, rank: int, error: BaseException) -> NoReturn:
        """`error` came up on a rank, in a step: end this process with the reason.

        That some other rank was lost is a consequence: what the lost one died of is the reason, and
        is known in a moment.
        """
        if isinstance(error, RankLost):
            why = error.message
            asyncio.get_running_loop().call_later(REASON_S, self.lose, rank, f"failed: {why}")
        else:
            if not isinstance(error, LocalFault):  # which is another rank's, and logged there
                log.error("step.failed", exc_info=error)
            known = isinstance(error, PdserveError)
            self.lose(rank, f"failed: {error if known else f'{type(error).__name__} in a step'}")
        await asyncio.get_running_loop().create_future()
        raise AssertionError("a worker without a rank has ended")

    def lose(self, rank: int, why: str) -> None:
        """The worker cannot go on: say why, end its ranks, end this process."""
        if self._is_ending:
            return
        self._is_ending = True
        ended = self.prepared.local.how_it_ended(rank, REASON_S if why == CLOSED else 0)
        self.prepared.local.kill()
        log.error("worker.lost", why=f"rank {rank} {ended or why}")
        flush_logs()
        self.prepared.local.reap(HASTY_REAP_S)
        os._exit(EXIT_FAILED)

    async def close(self) -> None:
        """Have all ranks end in order; whoever does not is killed."""
        if self._is_ending:
            return
        self._is_ending = True
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for channel in self.channels.values():
            channel.tell("end")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDS_S):
                for channel in self.channels.values():
                    await channel.over.wait()
        for channel in self.channels.values():
            await channel.close()
        self.prepared.local.kill()
        self.prepared.local.reap(REAP_S)

    def _take(self, rank: int, channel: RankChannel, host: str) -> None:
        """A rank is connected; it says `here` once it listens."""

        async def here(_: Message) -> None:
            self._here[rank].set()

        async def stop(_: Message) -> None:
            log.info("worker.told_to_stop", rank=rank)
            self.on_stop()

        self.channels[rank] = channel
        self.hosts[rank] = host
        channel.on_lost = lambda why: self.lose(rank, why)
        channel.handle("here", here)
        channel.handle("stop", stop)

    async def _accept(self, listener: socket.socket) -> None:
        """Let ranks of other hosts in until cancelled; more than are missing are turned away."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            while True:
                connection, address = await loop.sock_accept(listener)
                tasks.create_task(self._let_in(connection, str(address[0])))

    async def _let_in(self, connection: socket.socket, host: str) -> None:
        """Whoever connects says in time which rank of which plan he is, or is sent away."""
        try:
            channel = await RankChannel.open(connection, host)
        except OSError:  # gone already
            connection.close()
            return
        joined = asyncio.Event()

        async def join(message: Message) -> None:
            try:
                self._check(message.fields)
            except LocalFault as fault:
                log.warning("rank.refused", peer=host, why=fault.message)
                raise
            rank = int(message.fields["rank"])
            channel.peer = f"rank {rank}"
            self._take(rank, channel, host)
            joined.set()

        channel.handle("join", join)
        try:
            async with asyncio.timeout(HELLO_S):
                await joined.wait()
        except TimeoutError:
            await channel.close()
        except asyncio.CancelledError:
            if not joined.is_set():
                await channel.close()
            raise

    def _check(self, theirs: Mapping[str, Any]) -> None:
        check_plan(theirs, plan_fields(self.settings, self.prepared.files))
        rank = theirs.get("rank")
        local = {each.rank for each in self.prepared.local.ranks}
        if rank not in self._here or rank in local:
            raise LocalFault(f"no rank of other hosts: got {rank}")
        if rank in self.channels:
            raise LocalFault(f"rank {rank} is here already: two processes have the same ranks.node")


@contextlib.asynccontextmanager
async def gathered(
    settings: WorkerSettings, prepared: PreparedRanks, on_stop: Callable[[], None]
) -> AsyncIterator[Crew]:
    """The crew, once all of it is here; ended when the block is left."""
    crew = Crew(settings, prepared, on_stop)
    try:
        await crew.gather()
        yield crew
    finally:
        await crew.close()
        if prepared.listener is not None:
            prepared.listener.close()
