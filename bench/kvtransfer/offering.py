"""`python -m bench.kvtransfer.offering`: how long an offer keeps the event loop from all else.

A prefill worker has read a chunk of a prompt, and offers its blocks: 128 of 2 MiB, as 2,000 tokens
of a large model have. The digests are made on the event loop, or where the KV memory makes them.
Both take turns in every round. Prints the medians of the longest turn of the loop, in processor
time of its thread, so that other processes do not count, and of the time until the offer was there.
"""

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Iterator

import uvloop

from bench.kvtransfer.peer import layout_of
from kvtransfer.sender import HandoffSender
from kvtransfer.session import Event
from pdserve.domain.ids import HandoffId, RequestId
from pdserve.domain.messages import StartHandoff
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.kv_memory import KvMemory

NUM_BLOCKS = 128
BLOCK_BYTES = 2 << 20
WAYS = {"on the loop": NUM_BLOCKS * BLOCK_BYTES, "off the loop": KvMemory.thread_above_bytes}


class Turns:
    """The longest of the event loop."""

    longest_s = 0.0

    async def watch(self) -> None:
        last_s = time.thread_time()
        while True:
            await asyncio.sleep(0.0005)
            now_s = time.thread_time()
            self.longest_s, last_s = max(self.longest_s, now_s - last_s), now_s


@contextlib.contextmanager
def sender_of(memory: KvMemory, pool: BlockPool) -> Iterator[HandoffSender]:
    table = pool.reserve(NUM_BLOCKS)
    assert table is not None
    table.hold(0, NUM_BLOCKS)
    start = StartHandoff(
        handoff=HandoffId(RequestId("bench"), 1, 0),
        prompt_token_ids=(0,) * (NUM_BLOCKS * memory.layout.block_size),
        first_block=0,
        sampling=SamplingParams(),
        deadline_s=60.0,
    )
    sender = HandoffSender(
        start,
        block_table=table,
        memory=memory,
        block_size=memory.layout.block_size,
        lease_s=60.0,
        now_s=0.0,
    )
    yield sender
    sender.end(Event.END)


async def offer_once(memory: KvMemory, pool: BlockPool) -> tuple[float, float]:
    """Seconds: the longest turn, and all of the offer."""
    turns = Turns()
    watching = asyncio.create_task(turns.watch())
    await asyncio.sleep(0.01)
    turns.longest_s = 0.0
    with sender_of(memory, pool) as sender:
        start_s = time.perf_counter()
        await sender.offer(NUM_BLOCKS * memory.layout.block_size, is_last=True)
        elapsed_s = time.perf_counter() - start_s
        await asyncio.sleep(0.001)
    watching.cancel()
    return turns.longest_s, elapsed_s


async def main(num_rounds: int) -> None:
    memory, pool = KvMemory(layout_of(BLOCK_BYTES), NUM_BLOCKS), BlockPool(NUM_BLOCKS)
    memory.bytes[:] = b"\x55" * memory.num_bytes
    way_to_times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(num_rounds):
        for way, memory.thread_above_bytes in WAYS.items():
            way_to_times[way].append(await offer_once(memory, pool))
    for way, times in way_to_times.items():
        turn_s, elapsed_s = (statistics.median(each) for each in zip(*times, strict=True))
        print(f"{way}: longest turn {turn_s * 1e3:.2f} ms, offer {elapsed_s * 1e3:.1f} ms")
    memory.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What an offer costs the event loop")
    parser.add_argument("--rounds", type=int, default=25)
    uvloop.run(main(parser.parse_args().rounds))
