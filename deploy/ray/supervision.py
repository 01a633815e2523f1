"""Replacing what is lost: our own detection, since Ray's takes many seconds.

A life is lost when its process or its actor ends, when its node stops answering, or when the router
does not have it any more. Then it is ended for good, and another starts on a node that lives and
has room; the new worker draws a new epoch, and the router takes it in the old one's stead.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence

from ray.exceptions import RayError

from deploy.backoff import Backoff
from deploy.ray.absence import AbsenceJudge
from deploy.ray.connecting import answering, living_nodes
from deploy.ray.hosted import HostedProcess
from deploy.ray.placing import Placement, RayNode, place
from deploy.ray.slots import Slot
from pdserve.cli.problems import ClusterFailed
from pdserve.client.admin import AdminClient
from pdserve.config.timers import Timers
from pdserve.domain.errors import PdserveError
from pdserve.domain.messages import ClusterState

WATCH_S = 0.5
STATE_S = 1.0
PING_S = 1.0
END_S = 0.5
"""A lost process has this long to say that it is gone; its actor is killed then."""
RELAUNCH_S = 120.0

Tell = Callable[[str], None]


class Supervisor:
    """Watches all slots and replaces lost lives, until stopped. `slots[0]` is the router's."""

    def __init__(
        self,
        slots: Sequence[Slot],
        timers: Timers,
        tell: Tell,
        on_launch: Callable[[Slot], None],
    ) -> None:
        self._slots = slots
        self._timers = timers
        self._tell = tell
        self._on_launch = on_launch
        self._placing = asyncio.Lock()  # choosing a node and taking its resources is one step
        self._tasks: list[asyncio.Task[None]] = []

    def watch_nodes(self) -> None:
        """From here on a life whose node is gone is lost; during the start that fails the start."""
        self._run(self._watch_nodes())

    def watch_all(self, internal_address: str) -> None:
        """From here on what is lost is replaced."""
        self._run(self._watch_router(internal_address))
        for slot in self._slots:
            self._run(self._keep(slot))

    async def stop(self) -> None:
        """Nothing is replaced any more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_end)
        self._tasks.append(task)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """They only end when they are cancelled; a person should know otherwise."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._tell(
                f"the watch failed ({type(error).__name__}: {error}): what is lost from here on "
                "may not come back"
            )

    async def _keep(self, slot: Slot) -> None:
        """One slot: lose a life, start the next, for ever."""
        backoff = Backoff()
        while True:
            assert slot.hosted is not None
            born_s = time.monotonic()
            why = await slot.hosted.loss()
            lost_s = time.monotonic()
            self._tell(f"{slot.name} on {slot.hosted.node.label} {why}; starting it again")
            last_node = slot.hosted.node.node_id
            await slot.close(END_S)
            await asyncio.sleep(backoff.after_life(lost_s - born_s))
            node = await self._revive(slot, last_node)
            self._tell(
                f"{slot.name} serves again on {node.label}, {time.monotonic() - lost_s:.1f} s later"
            )

    async def _revive(self, slot: Slot, last_node: str) -> RayNode:
        """Try until it serves; tell each new reason why it does not."""
        told, started_s, backoff = "", time.monotonic(), Backoff()
        while True:
            try:
                await self._reserve(slot, last_node)
                await slot.launch(RELAUNCH_S)
                self._on_launch(slot)
                assert slot.hosted is not None
                return slot.hosted.node
            except (ClusterFailed, RayError) as error:
                await slot.close(END_S)
                why = error.message if isinstance(error, ClusterFailed) else type(error).__name__
                # Resources that were freed a moment ago show up late: no reason to alarm anyone.
                is_early = time.monotonic() - started_s < STATE_S
                if why != told and not is_early:
                    told = why
                    self._tell(f"{slot.name} waits: {told}; trying again")
            await asyncio.sleep(backoff.after_failure())

    async def _reserve(self, slot: Slot, last_node: str) -> None:
        async with self._placing:
            nodes = await living_nodes()
            mates = [
                other.hosted.node.node_id
                for other in self._slots
                if other.hosted is not None and slot.need.group == other.need.group != ""
            ]
            by_id = {node.node_id: node for node in nodes}
            if slot.role == "router":
                # Clients know its address: it stays on its node, which is the driver's own.
                if last_node not in by_id:
                    raise ClusterFailed("the router's node does not answer")
                await slot.reserve(by_id[last_node])
                return
            found = place([slot.need], nodes, prefer=[last_node, *mates])
            if not isinstance(found, Placement):
                raise ClusterFailed(f"none of {len(nodes)} nodes has room for it")
            await slot.reserve(by_id[found.nodes[slot.name]])

    async def _watch_nodes(self) -> None:
        """Two misses in a row: one may be the raylet being busy."""
        missed: set[str] = set()
        while True:
            lives = self._lives()
            nodes = {life.node.node_id: life.node for life in lives}
            alive = {node.node_id for node in await answering(nodes.values())}
            silent = nodes.keys() - alive
            for life in lives:
                if life.node.node_id in silent & missed:
                    life.lose("lost its node, which does not answer")
            missed = set(silent)
            await asyncio.sleep(WATCH_S)

    async def _watch_router(self, address: str) -> None:
        judge = AbsenceJudge(self._timers, time.monotonic())
        while True:
            # A channel of its own each time: one to a router that died waits before it tries again.
            async with AdminClient(address) as admin:
                state = await _state(admin)
                while state is not None:
                    await self._judge(judge, state)
                    await asyncio.sleep(WATCH_S)
                    state = await _state(admin)
            await self._judge(judge, None)
            await asyncio.sleep(WATCH_S)

    async def _judge(self, judge: AbsenceJudge, state: ClusterState | None) -> None:
        by_name = {slot.name: slot for slot in self._slots}
        serving = {
            slot.name: slot.serving_since_s
            for slot in self._slots[1:]
            if slot.serving_since_s is not None
        }
        verdict = judge.judge(time.monotonic(), state, serving)
        for name, why in verdict.lost.items():
            hosted = by_name[name].hosted
            if hosted is not None and by_name[name].serving_since_s is not None:
                hosted.lose(why)
        await asyncio.gather(*(self._ask(by_name[name]) for name in verdict.doubtful))

    async def _ask(self, slot: Slot) -> None:
        """A worker that is late with its heartbeats may only be busy; a dead actor is not."""
        hosted = slot.hosted
        if hosted is not None and not await hosted.answers(PING_S):
            hosted.lose("is silent, and so is its actor")

    def _lives(self) -> list[HostedProcess]:
        return [slot.hosted for slot in self._slots if slot.hosted is not None]


async def _state(admin: AdminClient) -> ClusterState | None:
    with contextlib.suppress(PdserveError):
        return await admin.cluster_state(timeout_s=STATE_S)
    return None
