"""Reads by nixl that end badly: `UCX_TLS=tcp,self python -m tests.support.nixl_over_tcp`.

Over TCP bytes are under way for a while; between processes of one host they arrive within the call
that asks for them. UCX reads the variable when it is loaded, so this is a process of its own. It
ends with 0 if all is as it should be.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from kvtransfer.transports.nixl import NixlTransport
from pdserve.domain.errors import TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import blocks, kv_memory
from tests.support.kv_peer import Peer, peer_process
from tests.support.waiting import wait_until

NUM_BLOCKS, BLOCK_BYTES = 512, 1 << 16
FIRST, SECOND = blocks(*range(192)), blocks(*range(192, 384))
SILENCE_S = 0.5
NOTICE_S = 5.0


@contextlib.contextmanager
def fails(why: str) -> Iterator[None]:
    start_s = time.monotonic()
    with pytest.raises(TransferFailed, match=why):
        yield
    assert time.monotonic() - start_s < NOTICE_S


async def some_turns() -> None:
    """In which a read asks for its first blocks."""
    for _ in range(10):
        await asyncio.sleep(0)


async def wait_for(condition: Callable[[], bool], what: str) -> None:
    await wait_until(condition, within_s=NOTICE_S, what=what)


def holds(target: KvMemory, block_ids: tuple[BlockId, ...], peer: Peer | None) -> bool:
    """What the peer has, or nothing."""
    return all(
        target.block(block) == (peer.block(block) if peer else bytes(BLOCK_BYTES))
        for block in block_ids
    )


async def stopped(transport: NixlTransport, peer: Peer, target: KvMemory) -> None:
    """Its read fails, and all bytes of it still arrive later: in slots that nobody was lent."""
    peer.process.send_signal(signal.SIGSTOP)
    with fails("silent for 0.5 s"):
        await transport.read(peer.region, FIRST, target, FIRST)
    assert transport.num_slots_out > 0
    with fails("an earlier read from it is still under way"):
        await transport.read(peer.region, FIRST[:1], target, FIRST[:1])
    peer.process.send_signal(signal.SIGCONT)
    await wait_for(lambda: transport.num_slots_out == 0, "late reads are over")
    await transport.read(peer.region, SECOND, target, SECOND)
    assert holds(target, FIRST, None)
    assert holds(target, SECOND, peer)


async def cancelled(transport: NixlTransport, peer: Peer, target: KvMemory) -> None:
    """At any turn, while the peer goes on sending."""
    for num_turns in (1, 2, 3, 5, 8, 13, 40):
        reading = asyncio.create_task(transport.read(peer.region, FIRST, target, FIRST))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        target.bytes[:] = bytes(target.num_bytes)
        await transport.read(peer.region, SECOND, target, SECOND)
        assert holds(target, FIRST, None), num_turns
        assert holds(target, SECOND, peer), num_turns


async def killed(transport: NixlTransport, peer: Peer, target: KvMemory) -> None:
    """While a read is under way; another life of it can be read."""
    peer.process.send_signal(signal.SIGSTOP)
    reading = asyncio.create_task(transport.read(peer.region, FIRST, target, FIRST))
    await some_turns()
    await peer.kill()
    with fails("the peer is gone"):
        await reading
    with fails("the peer is gone"):
        await transport.read(peer.region, FIRST, target, FIRST)
    async with peer_process("nixl", NUM_BLOCKS, BLOCK_BYTES) as again:
        await transport.read(again.region, SECOND, target, SECOND)
        assert holds(target, SECOND, again)


async def closed(transport: NixlTransport, peer: Peer, target: KvMemory) -> None:
    """While a read of a stopped peer is under way."""
    peer.process.send_signal(signal.SIGSTOP)
    reading = asyncio.create_task(transport.read(peer.region, FIRST, target, FIRST))
    await some_turns()
    await transport.close()
    with fails("closed by this side"):
        await reading
    with fails("closed by this side"):
        await transport.read(peer.region, FIRST, target, FIRST)
    assert holds(target, FIRST, None)


CASES = (stopped, cancelled, killed, closed)


async def run_all() -> None:
    for case in CASES:
        print(case.__name__, flush=True)
        transport = NixlTransport(idle_timeout_s=SILENCE_S, total_timeout_s=30.0)
        with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as target:
            async with peer_process("nixl", NUM_BLOCKS, BLOCK_BYTES) as peer:
                await transport.read(peer.region, FIRST[:1], target, FIRST[:1])
                target.bytes[:] = bytes(target.num_bytes)
                await case(transport, peer, target)
            await transport.close()


if __name__ == "__main__":
    asyncio.run(run_all())
