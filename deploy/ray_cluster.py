"""A whole cluster on Ray: placed by placement groups, watched by us; no request goes through it."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Self

from deploy.backend import KILL_GRACE_S, Cluster, ProcessRow, Report, side_by_side
from deploy.deployment import Deployment
from deploy.log_dir import LogDir
from deploy.preflight import check_ranks
from deploy.ray.connecting import connect, disconnect, living_nodes, this_node
from deploy.ray.fork_servers import ForkServers
from deploy.ray.hosted import HostedProcess
from deploy.ray.placing import Need, Placement, RayNode, place
from deploy.ray.resources import RayOptions, explain_unfit, needs_of
from deploy.ray.slots import Slot
from deploy.ray.stopping import StopRequest
from deploy.ray.supervision import Supervisor
from pdserve.domain.addresses import is_loopback, is_wildcard, join_address, split_address
from pdserve.domain.errors import LocalFault
from pdserve.engine.model_files import ModelFiles
from pdserve.observe.log_sinks import RotatingFile
from pdserve.observe.log_writer import LogWriter
from pdserve.observe.logging import say_dropped
from pdserve.worker.parts import running

CLOSE_S = 3.0
PLACE_POLL_S = 0.1
SETTLE_S = 2.0
"""Resources of a cluster that has just ended show up as free this much later, at most."""
LOG_S = 2.0
"""The last lines of a process that has ended arrive within this time."""
SHOWN_LEVELS = ("error", "critical")


class RayCluster(Cluster):
    """A router and its workers as actors of a Ray cluster, owned by an `async with` block.

        async with RayCluster.start(deployment) as cluster:
            client = InferenceClient(cluster.public_address)

    The router runs on this driver's node. What is lost while the block runs is replaced. Leaving
    the block drains router and workers; leaving it by an exception ends them. Either way no
    process, actor or placement group is left, nor would one be if this process were killed.
    """

    def __init__(self, deployment: Deployment, options: RayOptions, report: Report) -> None:
        super().__init__(deployment, report)
        self.options = options
        self.slots: list[Slot] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._log_copies: set[asyncio.Task[None]] = set()
        self._supervisor: Supervisor | None = None
        self._fork_servers = ForkServers()
        self._stop_request: StopRequest | None = None
        self._has_connected = False
        self._is_killed = False

    @classmethod
    def start(
        cls,
        deployment: Deployment,
        *,
        options: RayOptions | None = None,
        report: Report = lambda text: None,
    ) -> Self:
        """A cluster that starts when its `async with` block is entered.

        Entering raises `LocalFault` for what can be known beforehand and `ClusterFailed` for what
        Ray or a process says then. `report` hears of each step.
        """
        return cls(deployment, options or RayOptions(), report)

    @property
    def rows(self) -> Sequence[ProcessRow]:
        return [_row(slot) for slot in self.slots]

    def slot(self, name: str) -> Slot:
        """The process called `name`: router, prefill-0, decode-1, ..."""
        return next(slot for slot in self.slots if slot.name == name)

    def _check(self) -> None:
        engine = self.deployment.workers[0].settings.engine
        # A model that is not there, or cannot be divided among the ranks, is told at once.
        files = ModelFiles.open(self.deployment.router.model, engine.override_config)
        check_ranks(self.deployment, files)

    async def drain(self) -> None:
        if self._supervisor is not None:
            await self._supervisor.stop()
        await self._stop(self.slots[:1])
        await self._stop(self.slots[1:])
        if self._log_copies:
            await asyncio.wait(self._log_copies, timeout=LOG_S)

    def kill(self) -> None:
        self._is_killed = True
        for slot in self.slots:
            if slot.hosted is not None:
                slot.hosted.kill()

    async def _start_all(self) -> None:
        self._report("joining the Ray cluster")
        needs = needs_of(self.deployment, self.options)
        self._has_connected = await connect(self.options.address)
        nodes, placement = await self._place(needs)
        self._logs = LogDir.open(self.deployment.log_dir)
        self.slots = [self._router_slot(), *self._worker_slots(needs)]
        self._supervisor = Supervisor(
            self.slots, self.deployment.router.timers, self._tell, self._follow_log
        )
        self._supervisor.watch_nodes()
        by_id = {node.node_id: node for node in nodes}
        where = {"router": this_node(), **placement.nodes}
        self._report("reserving resources")
        await side_by_side(slot.reserve(by_id[where[slot.name]]) for slot in self.slots)
        await self._launch_all()
        await self._wait_for_registration(map(_loss_of, self.slots))
        self._stop_request = StopRequest(self.public_address, self.deployment.drain_s)
        self._spawn(self._await_stop_request(self._stop_request))
        self._supervisor.watch_all(self.internal_address)
        self._tell_exposure()

    async def _place(self, needs: Sequence[Need]) -> tuple[Sequence[RayNode], Placement]:
        """Nodes and what goes where; raises `LocalFault` where the workers do not fit."""
        deadline = asyncio.get_running_loop().time() + SETTLE_S
        while True:
            nodes = await living_nodes()
            found = place(needs, nodes)
            if isinstance(found, Placement):
                for note in found.notes:
                    self._tell(f"note: {note}")
                return nodes, found
            could_fit = isinstance(place(needs, [node.emptied() for node in nodes]), Placement)
            if not could_fit or asyncio.get_running_loop().time() > deadline:
                gpus = {worker.name: worker.gpu for worker in self.deployment.workers}
                raise LocalFault(explain_unfit(found, nodes, gpus))
            await asyncio.sleep(PLACE_POLL_S)

    def _router_slot(self) -> Slot:
        return Slot(
            role="router",
            settings=self.deployment.router,
            need=Need(name="router", bundle={}),
            fork_servers=self._fork_servers,
        )

    def _worker_slots(self, needs: Sequence[Need]) -> list[Slot]:
        # Cores are pinned where they are known: not on machines of others.
        return [
            Slot(
                role=worker.settings.role,
                settings=worker.settings.model_copy(update={"cpus": ()}),
                need=need,
                fork_servers=self._fork_servers,
            )
            for worker, need in zip(self.deployment.workers, needs, strict=True)
        ]

    async def _launch_all(self) -> None:
        """The router goes first: workers are told its address. Their actors come up meanwhile."""
        router, *workers = self.slots
        async with running(side_by_side(_hosted(slot).open() for slot in workers)) as opened:
            await self._launch(router)
            self._settle_addresses(router)
            await opened
        for slot in workers:
            update = {"routers": (self.internal_address,)}
            slot.settings = slot.settings.model_copy(update=update)
        await side_by_side(self._launch(slot) for slot in workers)

    async def _launch(self, slot: Slot) -> None:
        self._report(f"starting {slot.name} on {_hosted(slot).node.label}")
        await slot.launch(self.deployment.start_s)
        self._follow_log(slot)
        self._report(f"{slot.name} serves")

    def _settle_addresses(self, router: Slot) -> None:
        """What clients and workers dial; a router that takes its place listens on the same."""
        hosted = _hosted(router)
        assert hosted.started is not None
        public, internal = hosted.started.ready.address, hosted.started.ready.internal_address
        self.public_address = _dialled(public, hosted.host)
        self.internal_address = _dialled(internal, hosted.host)
        ports = {"port": split_address(public)[1], "internal_port": split_address(internal)[1]}
        router.settings = router.settings.model_copy(update=ports)

    async def _await_stop_request(self, request: StopRequest) -> None:
        if await request.wait():
            self._tell("asked to stop", asks_stop=True)

    async def _stop(self, slots: Sequence[Slot]) -> None:
        """SIGTERM, then wait for the drain."""
        lives = [slot.hosted for slot in slots if slot.hosted is not None]
        for life in lives:
            life.signal(signal.SIGTERM)
        ends = [asyncio.create_task(life.drained()) for life in lives]
        try:
            if ends:
                await asyncio.wait(ends, timeout=self.deployment.drain_s + KILL_GRACE_S)
        finally:
            for end in ends:
                end.cancel()

    async def _end_all_now(self, keeps_logs: bool) -> None:
        if self._supervisor is not None:
            await self._supervisor.stop()
        close_s = 0.0 if self._is_killed else CLOSE_S
        await asyncio.gather(*(slot.close(close_s, keeps_log=keeps_logs) for slot in self.slots))
        await self._fork_servers.close()
        if self._stop_request is not None:
            self._stop_request.close()
            self._stop_request = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._has_connected:
            self._has_connected = False
            await asyncio.to_thread(disconnect)

    def _follow_log(self, slot: Slot) -> None:
        for name, log in _hosted(slot).logs().items():
            copy = self._spawn(self._copy_log(name, log))
            self._log_copies.add(copy)
            copy.add_done_callback(self._log_copies.discard)

    async def _copy_log(self, name: str, log: AsyncIterator[bytes]) -> None:
        """Append the log of one life to the file of its name; tell what a person must know."""
        rest, settings = b"", self.deployment.router
        path = self.log_dir / f"{name}.log"
        file = RotatingFile(
            path, max_bytes=settings.max_log_bytes, num_files=settings.num_log_files
        )
        copy = LogWriter(file, say_dropped)
        try:
            async for chunk in log:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    copy.put(line + b"\n")
                    if self.options.shows_logs or _is_serious(line):
                        self._tell(f"{name} | {line.decode(errors='replace')}")
        finally:
            if rest:
                copy.put(rest + b"\n")
            await asyncio.shield(asyncio.to_thread(copy.close, LOG_S))
            file.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell_exposure(self) -> None:
        hosts = sorted({_hosted(slot).host for slot in self.slots})
        exposed = [host for host in hosts if not is_loopback(host)]
        if exposed:
            self._tell(
                f"warning: insecure: router and workers listen on {', '.join(exposed)} without TLS "
                "and login: whoever reaches these addresses can use the cluster and read what goes "
                "through it; close the network around them"
            )

    def _late_message(self) -> str:
        if not self.slots:
            limit = f"{self.deployment.start_s:g} s (start_s)"
            return f"the Ray cluster did not take the processes within {limit}"
        return super()._late_message()


def _row(slot: Slot) -> ProcessRow:
    hosted = slot.hosted
    if hosted is None or hosted.started is None:
        return ProcessRow(
            name=slot.name,
            role=slot.role,
            pid=0,
            address="",
            num_blocks=slot.num_blocks,
            place=hosted.node.label if hosted is not None else "waits for a node",
        )
    ready = hosted.started.ready
    return ProcessRow(
        name=slot.name,
        role=slot.role,
        pid=hosted.started.pid,
        address=_dialled(ready.internal_address, hosted.host),
        num_blocks=slot.num_blocks,
        metrics_address=_dialled(ready.metrics_address, hosted.host),
        place=hosted.node.label,
        num_ranks=slot.num_ranks,
        device=f"GPU {','.join(hosted.gpus)}" if hosted.gpus else "",
    )


async def _loss_of(slot: Slot) -> str:
    hosted = _hosted(slot)
    return f"{slot.name} on {hosted.node.label} {await hosted.loss()} while the cluster started"


def _hosted(slot: Slot) -> HostedProcess:
    assert slot.hosted is not None, f"{slot.name} has no place"
    return slot.hosted


def _dialled(address: str, host: str) -> str:
    """A listening address as others reach it."""
    if not address:
        return ""
    listening, port = split_address(address)
    return join_address(host, port) if is_wildcard(listening) else address


def _is_serious(line: bytes) -> bool:
    try:
        said = json.loads(line)
    except ValueError:
        return False
    return isinstance(said, dict) and said.get("level") in SHOWN_LEVELS
