"""Workers' registration streams: hello, heartbeats, and the link to each decode worker."""

import asyncio
from collections.abc import Callable
from random import Random

import structlog

from pdserve.config.timers import Timers
from pdserve.domain.errors import PdserveError, PeerFault, Reason, WorkerLost
from pdserve.domain.messages import PeerHello, RegisterReply, Role, WorkerHello
from pdserve.rpc.streams import RegisterServerLink
from router.decode_links import ConnectDecode, DecodeLink
from router.membership import Member, Membership

log = structlog.get_logger(__name__)


class Registrations:
    """One `serve` call for each registered worker; its end is the worker's death."""

    def __init__(
        self,
        membership: Membership,
        *,
        me: PeerHello,
        connect: ConnectDecode,
        timers: Timers,
        clock: Callable[[], float],
        rng: Random,
    ) -> None:
        self._membership = membership
        self._me = me
        self._connect = connect
        self._timers = timers
        self._clock = clock
        self._rng = rng

    async def serve(self, stream: RegisterServerLink) -> None:
        """Keep one worker registered while its stream lasts and it is heard.

        Raises `PeerFault` to tell a worker that is still there why it is not registered.
        """
        hello = await self._receive_hello(stream)
        replaced = asyncio.Event()
        member = self._membership.admit(hello, self._clock(), replaced.set)
        log.info("worker.registered", worker_id=hello.worker_id, role=hello.role, pid=hello.pid)
        fault: PeerFault = WorkerLost("the registration ended")
        try:
            await stream.send(self._reply())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(stream, member))
                tasks.create_task(_wait_until_replaced(replaced))
                if hello.role is Role.DECODE:
                    tasks.create_task(self._link(member))
        except* PeerFault as group:
            fault = _leaf(group)
        finally:
            self._membership.dismiss(member)
            log.info("worker.gone", worker_id=hello.worker_id, why=fault.message)
        raise fault

    async def _receive_hello(self, stream: RegisterServerLink) -> WorkerHello:
        try:
            async with asyncio.timeout(self._timers.connect_s):
                report = await stream.receive()
        except TimeoutError:
            raise PeerFault("no hello came") from None
        if not isinstance(report, WorkerHello):
            raise PeerFault("the first report must be a hello", reason=Reason.INCOMPATIBLE_PEER)
        return report

    def _reply(self) -> RegisterReply:
        return RegisterReply(
            router_id=self._me.peer_id,
            epoch=self._me.epoch,
            protocol_version=self._me.protocol_version,
            heartbeat_s=self._timers.heartbeat_s,
        )

    async def _listen(self, stream: RegisterServerLink, member: Member) -> None:
        """Take heartbeats until the stream is over or silent for too long; then raise."""
        while True:
            try:
                left_s = self._membership.dead_at_s(member) - self._clock()
                async with asyncio.timeout(left_s):
                    report = await stream.receive()
            except TimeoutError:
                if self._has_overslept(member):
                    continue
                raise WorkerLost(f"silent for {self._timers.dead_s:g} s") from None
            if isinstance(report, WorkerHello):
                log.warning("worker.hello_repeated", worker_id=member.hello.worker_id)
                continue
            self._membership.hear(member, report, self._clock())

    def _has_overslept(self, member: Member) -> bool:
        """True, with a new deadline, where it is this process that was stopped for a while.

        Heartbeats of that time are still in the sockets: no worker is dead for it.
        """
        now_s = self._clock()
        if now_s - self._membership.dead_at_s(member) < self._timers.heartbeat_s:
            return False
        log.warning("router.overslept", worker_id=member.hello.worker_id)
        self._membership.excuse(member, now_s)
        return True

    async def _link(self, member: Member) -> None:
        def on_change(is_open: bool) -> None:
            member.link = link if is_open else None

        link = DecodeLink(
            member.life,
            member.hello.address,
            me=self._me,
            connect=self._connect,
            timers=self._timers,
            rng=self._rng,
            on_change=on_change,
        )
        await link.run()


async def _wait_until_replaced(replaced: asyncio.Event) -> None:
    await replaced.wait()
    raise PeerFault("the worker registered again", reason=Reason.FENCED)


def _leaf(group: BaseExceptionGroup[PdserveError]) -> PeerFault:
    """The first fault inside; a group never leaves the function that opened it."""
    inner = group.exceptions[0]
    if isinstance(inner, BaseExceptionGroup):
        return _leaf(inner)
    assert isinstance(inner, PeerFault)
    return inner
