"""Any rank of a worker is killed or stopped under load: the whole worker is gone at once.

`PDSERVE_RANK_FAULT_ROUNDS=20` for many rounds; `make test` does one of each kind.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import psutil
import pytest

from deploy.local import LocalCluster
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.errors import PdserveError, Reason
from tests.support.waiting import wait_until

NUM_ROUNDS = int(os.environ.get("PDSERVE_RANK_FAULT_ROUNDS", "1"))
GONE_WITHIN_S = 3.0
PATIENCE_S = 120.0
NUM_CLIENTS = 4
NUM_TOKENS = 48
VICTIM = "decode-0"
STEPS = {"fixed_s": 0.01, "prefill_token_s": 1e-4, "decode_token_s": 1e-4}


@contextlib.asynccontextmanager
async def running(tp: int, pp: int) -> AsyncIterator[LocalCluster]:
    """Two workers of `tp * pp` ranks, each of which reads its own prompts."""
    settings = ClusterSettings.model_validate(
        {
            "tp": tp,
            "pp": pp,
            "num_blocks": 256,
            "coefficients": STEPS,  # given, so that no time goes into measuring them
            "router": {"port": 0, "internal_port": 0},
            "prefill": {"replicas": 0},
            "decode": {"replicas": 2},
        }
    )
    async with LocalCluster.start(settings) as cluster:
        yield cluster
        cluster.kill()


@dataclass
class Ended:
    """How one request ended."""

    seed: int
    tokens: tuple[int, ...]
    failure: PdserveError | None


class Load:
    """Clients that ask one request after the other."""

    def __init__(self, client: InferenceClient) -> None:
        self.ends: list[Ended] = []
        self._client = client
        self._seed = 0
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CLIENTS):
                tasks.create_task(self._ask_on())

    def stop(self) -> None:
        self._stopping.set()

    async def _ask_on(self) -> None:
        while not self._stopping.is_set():
            self._seed += 1
            self.ends.append(await ask(self._client, self._seed))
            if self.ends[-1].failure is not None:
                await asyncio.sleep(0.1)  # a client's own manners


async def ask(client: InferenceClient, seed: int) -> Ended:
    prompt = tuple(range(20 + seed % 7, 60 + seed % 5))
    sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, seed=seed)
    tokens: list[int] = []
    try:
        async for chunk in client.generate(prompt, sampling, timeout_s=PATIENCE_S):
            tokens += [token.token_id for token in chunk.tokens]
    except PdserveError as error:
        return Ended(seed, tuple(tokens), error)
    return Ended(seed, tuple(tokens), None)


def ranks_of(pid: int) -> list[psutil.Process]:
    """The processes of a worker, in rank order."""
    leader = psutil.Process(pid)
    followers = sorted(leader.children(), key=lambda each: int(each.name()[len("pdserve-rank") :]))
    return [leader, *followers]


def is_there(process: psutil.Process) -> bool:
    """A zombie is not: it has nothing but its number."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_listening(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


async def lose_one(cluster: LocalCluster, rank: int, number: signal.Signals) -> float:
    """How long the worker was there after its rank got the signal; checks what is left of it."""
    worker = cluster.process(VICTIM)
    ranks = ranks_of(worker.pid)
    ports = {
        connection.laddr.port
        for each in ranks
        for connection in each.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    ranks[rank].send_signal(number)
    gone_s = await wait_until(
        lambda: not any(map(is_there, ranks)) and not any(map(is_listening, ports)),
        within_s=10,
        what="all ranks and their ports are gone",
    )
    obituary = await next_message(cluster)
    if number is signal.SIGKILL and rank > 0:
        assert f"rank {rank} was killed by signal 9" in obituary
    if number is signal.SIGSTOP:
        assert f"rank {rank} has been stopped for" in obituary
    assert "serves again" in await next_message(cluster)
    return gone_s


async def next_message(cluster: LocalCluster) -> str:
    """What is said next of the victim."""
    while True:
        message = (await asyncio.wait_for(cluster.next_event(), PATIENCE_S)).message
        if message.startswith(VICTIM):
            return message


async def check(ends: Sequence[Ended], client: InferenceClient) -> int:
    """Whatever came is what an undisturbed run gives; how many requests were interrupted."""
    failed = [each for each in ends if each.failure is not None]
    for each in failed:
        assert each.failure is not None
        assert each.failure.reason in (Reason.STREAM_INTERRUPTED, Reason.WORKER_LOST), each
    spared = [each for each in ends if each.failure is None]
    assert all(len(each.tokens) == NUM_TOKENS for each in spared)
    for each in [*failed, *spared[-2:]]:
        again = await ask(client, each.seed)
        assert again.tokens[: len(each.tokens)] == each.tokens, f"seed {each.seed}"
    return len(failed)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
async def test_worker_is_gone_at_once_when_any_of_its_ranks_is_killed_or_stopped(
    tp: int, pp: int
) -> None:
    async with running(tp, pp) as cluster, InferenceClient(cluster.public_address) as client:
        load = Load(client)
        asking = asyncio.create_task(load.run())
        await wait_until(lambda: len(load.ends) > 2, within_s=PATIENCE_S, what="answers come")
        for turn in range(NUM_ROUNDS):
            for rank in range(tp * pp):
                for number in (signal.SIGKILL, signal.SIGSTOP):
                    began_s = time.monotonic()
                    gone_s = await lose_one(cluster, rank, number)
                    took_s = time.monotonic() - began_s
                    print(f"{turn} rank {rank} {number.name} gone {gone_s:.2f} back {took_s:.1f}")
                    assert gone_s < GONE_WITHIN_S
                    num_ends = len(load.ends)
                    await wait_until(
                        lambda seen=num_ends: len(load.ends) > seen + NUM_CLIENTS,  # type: ignore[misc]
                        within_s=PATIENCE_S,
                        what="answers come again",
                    )
        load.stop()
        await asyncio.wait_for(asking, PATIENCE_S)
        print(f"{await check(load.ends, client)} of {len(load.ends)} requests were interrupted")
