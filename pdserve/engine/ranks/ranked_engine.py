"""The engine of a worker of many ranks, as rank 0 has it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import LocalFault
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.contract import Engine, StepBatch, StepResult
from pdserve.engine.opening import limits_of
from pdserve.engine.ranks.batch_codec import batch_message, drawn_of
from pdserve.engine.ranks.channel import RankChannel
from pdserve.engine.ranks.crew import Crew
from pdserve.engine.ranks.follower import layout_fields, part_message, part_settings
from pdserve.engine.ranks.frames import Message
from pdserve.engine.ranks.ranked_kv import RankedKv, own_store

LOAD_S = 1800.0
"""Every rank has loaded its part of the model within this time."""


class RankedEngine:
    """Satisfies `Engine`. Every rank computes the same batch; a step is over when it is on each.

    `part` is what rank 0 computes itself. An error in a step, on any rank, ends this process: see
    `Crew.wait_for_end`. It does not look ahead: the draws are known to one rank only.
    """

    looks_ahead = False

    def __init__(self, part: Engine, place: RankPlace, crew: Crew, *, step_s: float) -> None:
        self.spec = part.spec
        self.place = place
        self.kv = RankedKv(own_store(part.kv), crew.in_order, deadline_s=step_s)
        self._part = part
        self._crew = crew
        self._channels = crew.in_order
        self._drawer = (place.pp - 1) * place.tp
        self._step_s = step_s
        self._turn = asyncio.Lock()

    @property
    def channels(self) -> list[RankChannel]:
        """To ranks 1, 2, ..."""
        return self._channels

    async def step(self, batch: StepBatch) -> StepResult:
        """Run the batch on all ranks. A cancelled call raises once the step is over on each."""
        running = asyncio.create_task(self._step(batch))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):  # raised again below
                    await asyncio.wait([running])
            running.exception()
            raise

    async def _step(self, batch: StepBatch) -> StepResult:
        if not batch.sequences:
            return StepResult((), 0.0)
        async with self._turn:
            began_s = time.perf_counter()
            message = batch_message(batch)
            answers = [channel.begin("step", message) for channel in self._channels]
            own = asyncio.create_task(self._part.step(batch))
            everything: list[asyncio.Future[Any]] = [own, *answers]
            await asyncio.wait(
                everything, timeout=self._step_s, return_when=asyncio.FIRST_EXCEPTION
            )
            for rank, each in enumerate(everything):
                if each.done() and (error := each.exception()) is not None:
                    await self._crew.wait_for_end(rank, error)
            for rank, each in enumerate(everything):
                if not each.done():
                    self._crew.lose(rank, f"has been in a step for {self._step_s:g} s")
            elapsed_s = time.perf_counter() - began_s
        result = own.result()
        if self._drawer == 0:
            return StepResult(result.sampled, elapsed_s, result.path)
        return StepResult(drawn_of(answers[self._drawer - 1].result()), elapsed_s, result.path)

    def close(self) -> None:
        """The other ranks are ended by their crew."""
        self._part.close()


@contextlib.asynccontextmanager
async def loaded(crew: Crew) -> AsyncIterator[RankedEngine]:
    """The engine, once every rank has loaded its part of the same model.

    Raises `LocalFault` with the rank and its reason if one cannot.
    """
    from pdserve.engine.ranks.meeting import meet
    from pdserve.engine.ranks.torch_group import serve_store

    settings, files = crew.settings, crew.prepared.files
    place = RankPlace(rank=0, tp=settings.engine.tp, pp=settings.engine.pp)
    step_s = settings.timers.stuck_s
    own = part_settings(settings, 0)
    store = serve_store(crew.own_host, place.num_ranks, LOAD_S)
    where = {"store_host": crew.own_host, "store_port": store.port, "deadline_s": LOAD_S}
    told = {rank: Message({**where, "host": host}) for rank, host in crew.hosts.items()}
    group, _ = await asyncio.gather(
        asyncio.to_thread(meet, place, own, host=crew.own_host, **where),
        crew.ask_all("group", told, deadline_s=LOAD_S),
    )
    part, said = await asyncio.gather(
        asyncio.to_thread(crew.prepared.load, files, own, limits_of(settings), group),
        crew.ask_all("load", Message(), deadline_s=LOAD_S),
    )
    try:
        _check_parts(part.spec, {0: part_message(part), **said})
        group.set_deadline(step_s)
        await crew.start(deadline_s=LOAD_S, step_s=step_s)
        yield RankedEngine(part, place, crew, step_s=step_s)
    finally:
        part.close()
        group.close()


def _check_parts(spec: EngineSpec, said: dict[int, Message]) -> None:
    """All ranks hold the same model, each the part that its place gives it."""
    try:
        sharded = spec.sharded_layout
    except ValueError as error:
        raise LocalFault(f"tp {spec.tp}, pp {spec.pp}: {error}") from None
    for rank, message in said.items():
        theirs = message.fields
        if theirs["model_hash"] != spec.model_hash.hex():
            raise LocalFault(f"rank {rank} has loaded another model than rank 0")
        whole, own = layout_fields(spec.layout), layout_fields(sharded.rank(rank).layout)
        if (theirs["layout"], theirs["own_layout"]) != (whole, own):
            raise LocalFault(
                f"rank {rank} holds other layers and KV heads than its place in tp {spec.tp}, pp "
                f"{spec.pp} says: this model cannot be divided so"
            )
