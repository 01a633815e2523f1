"""Either end of a transfer is killed or stopped in its middle: the other one goes on, and keeps
nothing of it.

`PDSERVE_TRANSFER_FAULT_ROUNDS=50` for many rounds; one of each kind is the default. The seed of a
round is printed.
"""

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from functools import cache
from pathlib import Path
from random import Random

import psutil
import pytest
import uvloop

from deploy.local import LocalCluster
from kvtransfer.transports import open_transports
from kvtransfer.transports.base import ReadEvent, Transport
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.config.cluster import ClusterSettings
from pdserve.config.timers import Timers
from pdserve.domain.errors import PdserveError, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory
from tests.support.kv_handoff import anyone, blocks, kv_memory
from tests.support.kv_peer import KvPeer, KvReader, start_fork_server
from tests.support.waiting import wait_until

NUM_ROUNDS = int(os.environ.get("PDSERVE_TRANSFER_FAULT_ROUNDS", "1"))
TRANSPORTS = ["shm", "tcp", "collective"]
SIGNALS = [signal.SIGKILL, signal.SIGSTOP]
SEED = 12
NUM_BLOCKS, BLOCK_BYTES = 120, 256 << 10
NUM_READ = NUM_BLOCKS * 3 // 4
TIMERS = Timers(connect_s=1.0, transfer_idle_s=1.0)
ENDS_WITHIN_S = 2.5  # a read by these timers, on a busy machine
MOMENTS_S = 0.03  # a transfer takes about that long

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore:Overriding the "event_loop_policy"'),
]


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """As workers run."""
    policy: asyncio.AbstractEventLoopPolicy = uvloop.EventLoopPolicy()
    return policy


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    start_fork_server()


def held() -> Counter[str]:
    """Descriptors by kind, threads by name (but for the loop's pool), names of shared memory."""
    gc.collect()
    fds = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    threads = [each.name for each in threading.enumerate() if not each.name.startswith("uvloop")]
    segments = [f"/dev/shm/{each.name}" for each in Path("/dev/shm").iterdir()]
    return Counter([*(fd.partition(":[")[0] for fd in fds), *threads, *segments])


async def wait_for_return(before: Counter[str]) -> None:
    """The other side of a connection learns of its end a little later."""
    with contextlib.suppress(AssertionError):
        await wait_until(lambda: held() == before, within_s=2 * ENDS_WITHIN_S, what="as before")
    assert held() == before


@contextlib.asynccontextmanager
async def transport_of(name: str) -> AsyncIterator[Transport]:
    (transport,) = open_transports([name], "127.0.0.1", timers=TIMERS)
    try:
        yield transport
    finally:
        await transport.close()


@cache
def content_of_all() -> bytes:
    return Random(SEED).randbytes(NUM_BLOCKS * BLOCK_BYTES)


async def read_exactly(transport: Transport, region: RemoteRegion, target: KvMemory) -> None:
    """A few blocks; all else stays as it was before."""
    target.bytes[:] = b"\xee" * target.num_bytes
    wanted = blocks(0, 5, 80)
    await transport.read(region, wanted, target, wanted)
    content = content_of_all()
    for block in range(NUM_BLOCKS):
        place = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        expected = content[place] if block in wanted else b"\xee" * BLOCK_BYTES
        assert target.block(BlockId(block)) == expected, block


async def lose_owner(
    name: str, transport: Transport, target: KvMemory, number: signal.Signals, moment_s: float
) -> str:
    """How the read ended."""
    owner = KvPeer(name, NUM_BLOCKS, BLOCK_BYTES, SEED)
    region = await asyncio.to_thread(owner.region)
    wanted = blocks(*range(NUM_READ))
    await transport.read(region, wanted[:1], target, wanted[:1])  # connects the two
    reading = asyncio.create_task(transport.read(region, wanted, target, wanted))
    await asyncio.sleep(moment_s)
    owner.send_signal(number)
    began_s = time.monotonic()
    try:
        await reading
        how = "whole"
    except TransferFailed as failure:
        how = failure.message
    took_s = time.monotonic() - began_s
    assert took_s < ENDS_WITHIN_S, how
    owner.close()
    await transport.close_peer(region)
    return f"{how} after {took_s:.2f} s"


async def after_a_loss(name: str, transport: Transport, target: KvMemory) -> None:
    """Whoever lived reads the next one."""
    owner = KvPeer(name, NUM_BLOCKS, BLOCK_BYTES, SEED)
    region = await asyncio.to_thread(owner.region)
    await read_exactly(transport, region, target)
    owner.close()
    await transport.close_peer(region)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", TRANSPORTS)
async def test_owner_lost_in_the_middle_costs_the_reader_one_read(
    name: str, number: signal.Signals
) -> None:
    with kv_memory(NUM_BLOCKS, BLOCK_BYTES) as target:
        async with transport_of(name) as transport:
            await after_a_loss(name, transport, target)
            before = held()
            for seed in range(NUM_ROUNDS):
                moment_s = Random(seed).uniform(0, MOMENTS_S)
                how = await lose_owner(name, transport, target, number, moment_s)
                print(f"seed {seed}: {name}, owner {number.name} after {moment_s:.3f} s: {how}")
                await after_a_loss(name, transport, target)
                await wait_for_return(before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", TRANSPORTS)
async def test_reader_lost_in_the_middle_costs_the_owner_nothing(
    name: str, number: signal.Signals
) -> None:
    open_reads: Counter[Sequence[BlockId]] = Counter()

    def on_read(event: ReadEvent) -> None:
        open_reads[event.block_ids] += -1 if event.is_over else 1

    with (
        kv_memory(NUM_BLOCKS, BLOCK_BYTES, seed=SEED) as source,
        kv_memory(NUM_BLOCKS, BLOCK_BYTES) as target,
    ):
        async with transport_of(name) as transport:
            server = await transport.serve(source, anyone, on_read)
            before = held()
            for seed in range(NUM_ROUNDS):
                reader = KvReader(server.region, NUM_READ, TIMERS)
                await asyncio.to_thread(reader.has_begun)
                moment_s = Random(seed).uniform(0, MOMENTS_S)
                await asyncio.sleep(moment_s)
                reader.send_signal(number)
                gone_s = await wait_until(
                    lambda: not any(open_reads.values()),
                    within_s=ENDS_WITHIN_S,
                    what="nothing is read for it any more",
                )
                print(f"seed {seed}: {name}, reader {number.name}, over after {gone_s:.2f} s")
                await read_exactly(transport, server.region, target)
                reader.close()
                await transport.close_peer(server.region)
                await wait_for_return(before)
            await server.close()


# Whole workers ------------------------------------------------------------------------------------

NUM_TOKENS = 12
PATIENCE_S = 120.0
STEPS = {"fixed_s": 0.005, "prefill_token_s": 1e-4, "decode_token_s": 1e-4}


async def ask(client: InferenceClient, seed: int) -> tuple[int, ...] | PdserveError:
    prompt = tuple(range(20 + seed % 7, 300 + seed % 5))
    sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, seed=seed)
    try:
        answer = await client.complete(prompt, sampling, timeout_s=PATIENCE_S)
    except PdserveError as error:
        return error
    return tuple(token.token_id for token in answer.tokens)


async def wait_idle(admin: AdminClient) -> None:
    """Until all workers are there and hold no block."""
    while True:
        state = await admin.cluster_state()
        if len(state.workers) == 3 and not state.busy_workers:
            return
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", TRANSPORTS)
async def test_a_prefill_worker_lost_under_load_costs_no_answer_and_no_block(
    name: str, number: signal.Signals
) -> None:
    settings = ClusterSettings.model_validate(
        {
            "num_blocks": 256,
            "prefix_reuse": False,  # so that every prompt travels
            "coefficients": STEPS,
            "transports": [name],
            "router": {"port": 0, "internal_port": 0},
            "prefill": {"replicas": 2, "max_step_tokens": 64},
            "decode": {"replicas": 1},
        }
    )
    seeds, answers = iter(range(10**6)), dict[int, tuple[int, ...] | PdserveError]()
    stopping = asyncio.Event()

    async def keep_asking(client: InferenceClient) -> None:
        while not stopping.is_set():
            seed = next(seeds)
            answers[seed] = await ask(client, seed)

    async def see_answers(count: int) -> None:
        until = len(answers) + count
        await wait_until(lambda: len(answers) >= until, within_s=PATIENCE_S, what="answers come")

    async with LocalCluster.start(settings) as cluster:
        async with InferenceClient(cluster.public_address) as client, asyncio.TaskGroup() as asking:
            for _ in range(4):
                asking.create_task(keep_asking(client))
            await see_answers(4)
            for seed in range(NUM_ROUNDS):
                victim = psutil.Process(cluster.process(f"prefill-{seed % 2}").pid)
                await asyncio.sleep(Random(seed).uniform(0, 0.2))
                victim.send_signal(number)
                await see_answers(8)
                if number is signal.SIGSTOP:
                    victim.resume()
                print(f"seed {seed}: {name}, prefill worker {number.name}")
                await see_answers(4)
            stopping.set()
        async with InferenceClient(cluster.public_address) as client:
            failed = {seed: each for seed, each in answers.items() if isinstance(each, Exception)}
            assert not failed
            for seed in Random(1).sample(sorted(answers), 4):
                assert await ask(client, seed) == answers[seed], f"seed {seed}"
        async with AdminClient(cluster.internal_address) as admin:
            await asyncio.wait_for(wait_idle(admin), PATIENCE_S)
        cluster.kill()
