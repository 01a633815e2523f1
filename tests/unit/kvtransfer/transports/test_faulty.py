from typing import Literal

import pytest

from kvtransfer.transports.faulty import FaultyTransport
from tests.support.kv_handoff import DirectTransport, anyone, blocks, kv_memory

IDS = blocks(0, 1, 2, 3)


@pytest.mark.parametrize(("corrupt", "expected"), [(0, 0), (1, 1), (3, 3), ("all", 8)])
async def test_the_first_blocks_read_differ_in_one_byte_each(
    corrupt: int | Literal["all"], expected: int
) -> None:
    with kv_memory(4, seed=1) as source, kv_memory(4) as target:
        inner = DirectTransport()
        region = inner.add(source, anyone)
        transport = FaultyTransport(inner, corrupt)
        num_wrong_bytes = 0
        for _ in range(2):
            await transport.read(region, IDS, target, IDS)
            pairs = zip(source.bytes, target.bytes, strict=True)
            num_wrong_bytes += sum(one != two for one, two in pairs)
        assert num_wrong_bytes == transport.num_corrupted == expected


async def test_it_stands_in_for_the_transport_it_damages() -> None:
    inner = DirectTransport()
    transport = FaultyTransport(inner, 1)
    with kv_memory(4) as memory:
        server = await transport.serve(memory, anyone)
        assert transport.name == inner.name
        assert transport.can_reach(server.region)
        await transport.close_peer(server.region)
        await transport.close()
