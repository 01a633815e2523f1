"""One life of one process on one Ray node: placement group, actors, serving process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from deploy.processes import BY_SIGNAL, ProcessRole
from deploy.ray.actors import NotStarted, RankActor, Site, Started
from deploy.ray.placing import Need, RayNode
from pdserve.cli.problems import ClusterFailed
from pdserve.config.base import Settings
from pdserve.config.processes import WorkerSettings
from pdserve.config.ranks import RankSettings
from pdserve.domain.addresses import join_address
from pdserve.domain.ids import PROTOCOL_VERSION

RESERVE_S = 5.0
OPEN_S = 60.0  # a node that has never run Ray work starts a Python first
NODE_ID_LABEL = "ray.io/node-id"
REASON_S = 0.5  # ranks that end together are heard of within this time

T = TypeVar("T")


class Reservation:
    """Resources of one node, held for one process; the router asks for none and has no group."""

    def __init__(self, need: Need, node: RayNode, group: PlacementGroup | None) -> None:
        self.need = need
        self.node = node
        self.group = group

    @classmethod
    async def take(cls, need: Need, node: RayNode) -> Self:
        """Raises `ClusterFailed` where the node has not got them after all."""
        bundle = {name: amount for name, amount in need.bundle.items() if amount}
        if not bundle:
            return cls(need, node, None)
        group = placement_group(
            [bundle] * need.num_ranks,
            strategy="STRICT_PACK",
            name=f"pdserve {need.name}",
            bundle_label_selector=[{NODE_ID_LABEL: node.node_id}] * need.num_ranks,
        )
        reservation = cls(need, node, group)
        if not await asyncio.to_thread(group.wait, RESERVE_S):
            reservation.release()
            raise ClusterFailed(
                f"{need.name}: {node.label} did not give its resources within {RESERVE_S:g} s"
            )
        return reservation

    def release(self) -> None:
        """Ray ends what still runs in it."""
        if self.group is not None:
            remove_placement_group(self.group)

    def actor_options(self, rank: int) -> dict[str, Any]:
        """Options of the actor of one rank: its bundle, or a place on the node."""
        if self.group is None:
            affinity = NodeAffinitySchedulingStrategy(self.node.node_id, soft=False)
            return {"num_cpus": 0, "scheduling_strategy": affinity}
        amounts = dict(self.group.bundle_specs[rank])
        return {
            "num_cpus": amounts.pop("CPU", 0),
            "num_gpus": amounts.pop("GPU", 0),
            "resources": amounts,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=rank
            ),
        }


class HostedProcess:
    """The processes of one worker, or a router's, seen from the driver. Who opened it closes it."""

    def __init__(self, reservation: Reservation) -> None:
        self.name = reservation.need.name
        self.node = reservation.node
        self.host = reservation.node.host
        self.gpus: tuple[str, ...] = ()  # of each rank, as Ray names them
        self.pids: tuple[int, ...] = ()  # of the process of each rank
        self.started: Started | None = None  # of rank 0, the worker to all others
        self._reservation = reservation
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        actor = ray.remote(RankActor)
        self._actors: list[Any] = [
            actor.options(max_restarts=0, **reservation.actor_options(rank)).remote()
            for rank in range(reservation.need.num_ranks)
        ]

    async def open(self) -> None:
        """Until all ranks have their place; raises `ClusterFailed` where one does not get it."""
        sites: list[Site] = await self.ask(
            _gather([actor.site.remote() for actor in self._actors]), OPEN_S, "has no actor"
        )
        self.host = sites[0].host
        self.gpus = tuple(site.gpus for site in sites if site.gpus)
        versions = {site.protocol_version for site in sites}
        if versions != {PROTOCOL_VERSION}:
            raise ClusterFailed(
                f"{self.name}: {self.node.label} speaks wire version "
                f"{', '.join(map(str, sorted(versions)))}, this pdserve {PROTOCOL_VERSION}: "
                "install the same pdserve on all machines"
            )

    async def start(
        self, role: ProcessRole, settings: Settings, within_s: float, *, fork_server: str = ""
    ) -> Started:
        """Run the process of each rank; raises `ClusterFailed` with the reason or log of one."""
        told = await self._settings_of_ranks(settings)
        calls = [
            actor.start.remote(self._rank_name(rank), role, own.model_dump_json(), fork_server)
            for rank, (actor, own) in enumerate(zip(self._actors, told, strict=True))
        ]
        said = await self.ask(_all_or_failed(calls), within_s, "did not start")
        if isinstance(said, NotStarted):
            raise ClusterFailed(f"on {self.node.label}: {said.message}")
        self.pids = tuple(each.pid for each in said)
        self.started = said[0]
        return self.started

    async def _settings_of_ranks(self, settings: Settings) -> list[Settings]:
        """Of the process of each rank: they meet at a port of the first one's node."""
        if not isinstance(settings, WorkerSettings) or len(self._actors) == 1:
            return [settings]
        call = self._leader.free_port.remote(self.host)
        port: int = await self.ask(_result(call), OPEN_S, "has no free port")
        leader = join_address(self.host, port)
        return [
            settings.model_copy(
                update={"ranks": RankSettings(node=rank, per_node=1, leader=leader)}
            )
            for rank in range(len(self._actors))
        ]

    def _rank_name(self, rank: int) -> str:
        return f"{self.name}.rank{rank}" if rank else self.name

    def lose(self, why: str) -> None:
        """Give this life up: whoever waits for it learns `why`."""
        if not self._lost.done():
            self._lost.set_result(why)

    async def loss(self) -> str:
        """Why this life is over, once it is: it ended, or somebody gave it up."""
        ended = asyncio.create_task(self.ended())
        try:
            await asyncio.wait({ended, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            return self._lost.result() if self._lost.done() else ended.result()
        finally:
            ended.cancel()

    async def ended(self) -> str:
        """How it ended, once one of its ranks has: all live and end together.

        A rank that a signal ended is the reason why the others did, whoever is heard of first.
        """
        ends = [asyncio.create_task(self._ended(rank)) for rank in range(len(self._actors))]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(ends, timeout=REASON_S)
            told = [end.result() for end in ends if end.done()]
            signalled = (each for each in told if BY_SIGNAL in each.partition(";")[0])
            return next(signalled, told[0])
        finally:
            for end in ends:
                end.cancel()

    async def drained(self) -> None:
        """Until rank 0 has ended, which the others wait for."""
        await self._ended(0)

    async def _ended(self, rank: int) -> str:
        """Also if only the actor of the rank did."""
        of = f"lost rank {rank}, which " if rank else ""
        try:
            return f"{of}{await _result(self._actors[rank].ended.remote())}"
        except RayActorError as error:
            return f"{of}lost its actor ({type(error).__name__})"
        except RayError as error:
            return f"{of}could not be watched ({type(error).__name__})"

    def logs(self) -> Mapping[str, AsyncIterator[bytes]]:
        """The log of each rank under a name of its own."""
        return {
            self._rank_name(rank): self._log_of(actor) for rank, actor in enumerate(self._actors)
        }

    async def _log_of(self, actor: Any) -> AsyncIterator[bytes]:
        """As it is written, in pieces, until the process or its actor ends."""
        with contextlib.suppress(RayError):
            while chunk := await _result(actor.next_log.remote()):
                yield chunk

    async def answers(self, within_s: float) -> bool:
        """Whether its actors do."""
        try:
            async with asyncio.timeout(within_s):
                await _gather([actor.ping.remote() for actor in self._actors])
        except (RayError, TimeoutError):
            return False
        return True

    def signal(self, number: int) -> None:
        """To rank 0: the others end with it."""
        self._leader.signal.remote(number)

    async def close(self, within_s: float, *, keeps_log: bool = True) -> None:
        """End process and actors and give the resources back.

        Waits until the process is gone, for `within_s` at most: its actor may not answer, and
        killing that one ends the process too.
        """
        try:
            with contextlib.suppress(RayError, TimeoutError):
                async with asyncio.timeout(within_s):
                    await _gather([actor.close.remote(keeps_log) for actor in self._actors])
        finally:
            self.kill()
            self._reservation.release()

    def kill(self) -> None:
        """End actors at once, and so the process."""
        for actor in self._actors:
            ray.kill(actor)

    @property
    def _leader(self) -> Any:
        return self._actors[0]

    async def ask(self, call: Coroutine[None, None, T], within_s: float, what: str) -> T:
        """An answer that this life needs; raises `ClusterFailed` where none comes, or it is lost.

        `what` completes "decode-0 ... on 10.0.0.5 within 5 s".
        """
        where = f"{self.name} {what} on {self.node.label}"
        asked = asyncio.create_task(call)
        try:
            either: set[asyncio.Future[Any]] = {asked, self._lost}
            await asyncio.wait(either, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
        except RayError as error:
            raise ClusterFailed(f"{where}: {explain_ray_error(error)}") from None
        finally:
            asked.cancel()
        if self._lost.done():
            raise ClusterFailed(f"{where}: it {self._lost.result()}")
        raise ClusterFailed(f"{where} within {within_s:g} s")


def explain_ray_error(error: RayError) -> str:
    """Why an actor is gone: Ray's own words are for those who wrote the actor."""
    text = str(error)
    if "ModuleNotFoundError" in text:
        return "its Python has no pdserve: install pdserve[worker,ray] on every node"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the actor died ({lines[0] if lines else type(error).__name__})"


async def _all_or_failed(calls: Sequence[Any]) -> list[Started] | NotStarted:
    """What the calls say once all have started; why not, as soon as one has not."""
    tasks = [asyncio.create_task(_result(call)) for call in calls]
    try:
        for next_one in asyncio.as_completed(tasks):
            said: Started | NotStarted = await next_one
            if isinstance(said, NotStarted):
                return said
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def _result(call: Any) -> Any:
    return await call


async def _gather(calls: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*map(_result, calls)))
