"""`Path`: which transport reads a peer, why, and what takes over when it fails."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import structlog

from deploy.simulated.virtual_time import virtual
from kvtransfer.paths import Path, PathRules, open_path
from kvtransfer.transports import open_transports
from kvtransfer.transports.divided import PartsRegion, ReadsParts
from pdserve.config.timers import Timers
from pdserve.domain.errors import ReadRefused, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore
from tests.support.kv_handoff import DirectTransport, anyone, blocks, kv_memory


class Named(DirectTransport):
    """Under any name; fails by what it is told to."""

    def __init__(self, name: str, *, reaches: bool = True) -> None:
        super().__init__()
        self.name = name
        self.fault: TransferFailed | None = None
        self.num_tried = 0
        self.num_closed = 0
        self._reaches = reaches

    def can_reach(self, region: RemoteRegion) -> bool:
        return self._reaches and super().can_reach(region)

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        self.num_tried += 1
        if self.fault is not None:
            raise self.fault
        await super().read(region, remote_blocks, memory, local_blocks)

    async def close_peer(self, region: RemoteRegion) -> None:
        self.num_closed += 1


class NamedParts(Named, ReadsParts):
    """Takes parts, too; of these it moves none."""

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        are_parts = isinstance(region, PartsRegion)
        region = replace(region, block_bytes=memory.layout.block_bytes) if are_parts else region
        pairs = ((), ()) if are_parts else (remote_blocks, local_blocks)
        await super().read(region, pairs[0], memory, pairs[1])


@asynccontextmanager
async def memories(*transports: Named) -> AsyncIterator[tuple[list[RemoteRegion], KvMemory]]:
    """One with content, offered by each transport, and one to read it into."""
    with kv_memory(4, seed=1) as source, kv_memory(4) as target:
        yield [transport.add(source, anyone) for transport in transports], target
        assert target.block(BlockId(0)) in (source.block(BlockId(1)), bytes(64))


async def read(path: Path, target: KvMemory) -> None:
    await path.read(blocks(1), target, blocks(0))


AVOID_S = 30.0
RULES = PathRules(avoid_s=AVOID_S)


@virtual
async def test_the_first_transport_that_reaches_the_peer_is_used_and_said_why() -> None:
    first, second = Named("first"), Named("second")
    async with memories(first, second) as (regions, target):
        path = open_path([first, second], regions[::-1], RULES)
        assert path is not None
        assert path.transport_name == "first"
        assert path.why == "the first that both have, before second"
        await read(path, target)
        assert (first.num_tried, second.num_tried) == (1, 0)
        only = open_path([first], regions, RULES)
        assert only is not None
        assert only.why == "the only one that both have"


@virtual
async def test_why_a_better_transport_is_not_used_is_said() -> None:
    far, absent, near = Named("far", reaches=False), Named("absent"), Named("near")
    async with memories(far, near) as (regions, _):
        path = open_path([far, absent, near], regions, RULES)
        assert path is not None
        assert path.transport_name == "near"
        assert path.why == "far does not reach the peer; absent is not offered by the peer"
        assert open_path([far, absent], regions, RULES) is None
        assert open_path([near], [], RULES) is None


@virtual
async def test_a_failing_transport_is_taken_over_at_once_and_left_alone_for_a_while() -> None:
    first, second = Named("first"), Named("second")
    heard: list[str] = []
    async with memories(first, second) as (regions, target):
        rules = PathRules(avoid_s=AVOID_S, on_fallback=heard.append)
        path = open_path([first, second], regions, rules)
        assert path is not None
        first.fault = TransferFailed("the peer was silent for 2 s")
        with structlog.testing.capture_logs() as logs:
            await read(path, target)
            await asyncio.sleep(AVOID_S - 1)
            await read(path, target)
        assert (first.num_tried, second.num_tried) == (1, 2)
        assert path.transport_name == "second"
        assert path.why == "first failed (the peer was silent for 2 s) and is tried again in 1 s"
        assert (heard, path.num_fallbacks) == (["first"], 1)
        [entry] = [entry for entry in logs if entry["event"] == "kv_transport.failed"]
        assert (entry["transport"], entry["instead"]) == ("first", "second")
        first.fault = None
        await asyncio.sleep(1)
        await read(path, target)
        assert (first.num_tried, second.num_tried) == (2, 2)
        assert path.why == "the first that both have, before second"


@virtual
async def test_a_transport_that_fails_again_after_a_while_is_left_alone_again() -> None:
    first, second = Named("first"), Named("second")
    async with memories(first, second) as (regions, target):
        path = open_path([first, second], regions, RULES)
        assert path is not None
        first.fault = TransferFailed("broken")
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                await read(path, target)
                await read(path, target)
                await asyncio.sleep(AVOID_S)
        assert (first.num_tried, second.num_tried, path.num_fallbacks) == (3, 6, 3)
        assert len(logs) == 3


@virtual
async def test_when_all_fail_the_last_failure_is_raised_and_all_are_tried_again() -> None:
    first, second = Named("first"), Named("second")
    async with memories(first, second) as (regions, target):
        path = open_path([first, second], regions, RULES)
        assert path is not None
        first.fault, second.fault = TransferFailed("one"), TransferFailed("two")
        for _ in range(2):
            with pytest.raises(TransferFailed, match="two"):
                await read(path, target)
        assert (first.num_tried, second.num_tried) == (2, 2)
        first.fault = None
        await read(path, target)
        assert path.transport_name == "first"


@virtual
async def test_a_refusal_is_the_peers_own_word_and_no_failure_of_the_transport() -> None:
    first, second = Named("first"), Named("second")
    async with memories(first, second) as (regions, target):
        path = open_path([first, second], regions, RULES)
        assert path is not None
        first.fault = ReadRefused("not on offer")
        with pytest.raises(ReadRefused):
            await read(path, target)
        assert (second.num_tried, path.transport_name) == (0, "first")


@virtual
async def test_parts_go_by_those_that_take_them_and_whole_blocks_by_the_next() -> None:
    first, second, third = NamedParts("first"), NamedParts("second"), Named("third")
    async with memories(first, second, third) as (regions, target):
        path = open_path([first, second, third], regions, RULES)
        assert path is not None

        async def read_parts() -> bool:
            return await path.read_parts([BlockId(2)], target, [BlockId(0)], 2)

        assert path.reads_parts
        assert await read_parts()
        first.fault = TransferFailed("one")
        assert await read_parts()
        assert (first.num_tried, second.num_tried, path.transport_name) == (2, 1, "second")
        second.fault = TransferFailed("two")
        assert not await read_parts()
        assert (third.num_tried, path.transport_name, path.reads_parts) == (0, "third", False)
        await read(path, target)
        assert (first.num_tried, second.num_tried, third.num_tried) == (2, 2, 1)
        await asyncio.sleep(AVOID_S)
        second.fault = ReadRefused("not on offer")
        first.fault = TransferFailed("one")
        with pytest.raises(ReadRefused):
            await read_parts()


@virtual
async def test_closing_forgets_the_peer_by_every_way() -> None:
    first, second = Named("first"), Named("second")
    async with memories(first, second) as (regions, _):
        path = open_path([first, second], regions, RULES)
        assert path is not None
        await path.close()
        assert (first.num_closed, second.num_closed) == (1, 1)


async def test_a_broken_group_is_replaced_by_a_socket_within_one_read() -> None:
    """The real transports: the port of the groups does not answer any more."""
    transports = open_transports(["collective", "tcp"], "127.0.0.1", timers=Timers())
    with kv_memory(4, seed=1) as source, kv_memory(4) as target:
        groups, sockets = [await each.serve(source, anyone) for each in transports]
        path = open_path(transports, [groups.region, sockets.region], RULES)
        assert path is not None
        await path.read(blocks(1), target, blocks(0))
        assert path.transport_name == "collective"
        await groups.close()
        await path.read(blocks(2), target, blocks(3))
        assert target.block(BlockId(3)) == source.block(BlockId(2))
        assert path.transport_name == "tcp"
        assert "collective failed" in path.why
        await path.close()
        await sockets.close()
        for each in transports:
            await each.close()
