"""One life of one process on one Ray node: placement group, actors, serving process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from deploy.processes import ProcessRole
from deploy.ray.actors import NotStarted, RankActor, Site, Started
from deploy.ray.placing import Need, RayNode
from pdserve.cli.problems import ClusterFailed
from pdserve.config.base import Settings
from pdserve.domain.ids import PROTOCOL_VERSION

RESERVE_S = 5.0
OPEN_S = 60.0  # a node that has never run Ray work starts a Python first
NODE_ID_LABEL = "ray.io/node-id"

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
    """A process on a node, seen from the driver. Whoever opened it closes it."""

    def __init__(self, reservation: Reservation) -> None:
        self.name = reservation.need.name
        self.node = reservation.node
        self.host = reservation.node.host
        self.started: Started | None = None
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
        """Run the serving process; raises `ClusterFailed` with its reason or its log."""
        text = settings.model_dump_json()
        call = self._leader.start.remote(self.name, role, text, fork_server)
        said: Started | NotStarted = await self.ask(_result(call), within_s, "did not start")
        if isinstance(said, NotStarted):
            raise ClusterFailed(f"on {self.node.label}: {said.message}")
        self.started = said
        return said

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
        """How it ended, once it has; also where only its actor did."""
        try:
            return str(await _result(self._leader.ended.remote()))
        except RayActorError as error:
            return f"lost its actor ({type(error).__name__})"
        except RayError as error:
            return f"could not be watched ({type(error).__name__})"

    async def log(self) -> AsyncIterator[bytes]:
        """Its log as it is written, in pieces, until it or its actor ends."""
        with contextlib.suppress(RayError):
            while chunk := await _result(self._leader.next_log.remote()):
                yield chunk

    async def answers(self, within_s: float) -> bool:
        """Whether its actor does."""
        try:
            async with asyncio.timeout(within_s):
                await _result(self._leader.ping.remote())
        except (RayError, TimeoutError):
            return False
        return True

    def signal(self, number: int) -> None:
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


async def _result(call: Any) -> Any:
    return await call


async def _gather(calls: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*map(_result, calls)))
