"""Streams in memory end as those between processes do."""

import asyncio
from typing import Any

import pytest

from deploy.simulated.virtual_time import virtual
from pdserve.domain.errors import PeerFault, Reason, WorkerLost
from pdserve.rpc.memory_network import MemoryNetwork, Stream
from pdserve.rpc.streams import iterate


async def echo(stream: Stream) -> None:
    async for message in iterate(stream):
        await stream.send(message)


@virtual
async def test_messages_arrive_in_order_after_their_delay() -> None:
    async with MemoryNetwork(lambda: 0.5) as network:
        network.listen("here", echo)
        start_s = asyncio.get_running_loop().time()
        stream = await network.connect("here")
        for number in range(3):
            await stream.send(number)
        assert [await stream.receive() for _ in range(3)] == [0, 1, 2]
        # Half a second to connect; then each way carries a message at a time.
        assert asyncio.get_running_loop().time() - start_s == pytest.approx(0.5 + 3 * 0.5 + 0.5)


@virtual
async def test_nobody_answers_at_an_address_that_was_left_and_its_streams_are_lost() -> None:
    async with MemoryNetwork() as network:
        network.listen("here", echo)
        stream = await network.connect("here")
        network.leave("here")
        with pytest.raises(WorkerLost):
            await stream.receive()
        with pytest.raises(WorkerLost):
            await network.connect("here")


@virtual
async def test_refused_caller_learns_why() -> None:
    async def refuse(stream: Any) -> None:
        raise PeerFault("protocol versions differ", reason=Reason.INCOMPATIBLE_PEER)

    async with MemoryNetwork() as network:
        network.listen("here", refuse)
        stream = await network.connect("here")
        with pytest.raises(WorkerLost, match="protocol versions differ") as caught:
            await stream.receive()
        assert caught.value.reason is Reason.INCOMPATIBLE_PEER
        await asyncio.sleep(0.1)
        assert not network.wires["here"], "a stream that is over is not kept"
