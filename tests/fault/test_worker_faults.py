"""Real worker processes that die, stop and drain under a request: its tokens stay exact.

Every moment of a handoff is cut in virtual time by `tests/unit/decode_worker/test_handoff.py`;
here are the faults that only the system can make. Corrupt KV is in `tests/e2e/test_corruption.py`.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator

import pytest

from deploy.local import LocalCluster
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Chunk, Sampling
from pdserve.config.cluster import ClusterSettings
from pdserve.config.processes import CoefficientSettings, EngineSettings
from pdserve.domain.messages import Role, WorkerState
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.opening import open_engine
from tests.support.timed_oracle import timed_tokens

COEFFICIENTS = CoefficientSettings(fixed_s=0.005, prefill_token_s=0.01, decode_token_s=0.001)
PROMPT = tuple(range(20, 120))
READ_S = 1.5
"""About the time to read the prompt, on a busy machine."""
DETECT_S = 3.0
PATIENCE_S = 30.0


@contextlib.asynccontextmanager
async def running(num_prefill: int) -> AsyncIterator[tuple[LocalCluster, InferenceClient]]:
    settings = ClusterSettings.model_validate(
        {
            "engine": "timed",
            "coefficients": COEFFICIENTS.model_dump(),
            "router": {"port": 0, "internal_port": 0},
            "prefill": {"replicas": num_prefill, "max_step_tokens": 16},
            "decode": {"replicas": 1},
            "timers": {"heartbeat_s": 0.05, "drain_s": 10.0},
        }
    )
    async with LocalCluster.start(settings) as cluster:
        async with InferenceClient(cluster.public_address) as client:
            yield cluster, client
        cluster.kill()


def oracle(num_tokens: int) -> tuple[int, ...]:
    engine = open_engine(EngineSettings(engine="timed", coefficients=COEFFICIENTS, num_blocks=1))
    try:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return timed_tokens(PROMPT, num_tokens, spec=engine.spec, params=params)
    finally:
        engine.close()


class Asked:
    """One request in flight."""

    def __init__(self, client: InferenceClient, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.chunks: list[Chunk] = []
        self.has_begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(client))

    async def _read(self, client: InferenceClient) -> None:
        sampling = Sampling(max_tokens=self.num_tokens, ignore_eos=True)
        async for chunk in client.generate(PROMPT, sampling, timeout_s=PATIENCE_S):
            self.chunks.append(chunk)
            self.has_begun.set()

    async def assert_exact(self) -> str:
        """The whole answer came, token for token; returns which worker read its prompt."""
        await self.task
        tokens = [token.token_id for chunk in self.chunks for token in chunk.tokens]
        assert tuple(tokens) == oracle(self.num_tokens)
        finished = self.chunks[-1].finished
        assert finished is not None
        return finished.timeline.prefill_worker


async def worker_where(cluster: LocalCluster, role: Role, min_num_tokens: int) -> WorkerState:
    """The first worker of a role that reports to have computed so much."""
    async with AdminClient(cluster.internal_address) as admin, asyncio.timeout(PATIENCE_S):
        while True:
            for worker in (await admin.cluster_state()).workers:
                if worker.hello.role is role and worker.load.num_tokens >= min_num_tokens:
                    return worker
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_prefill_worker_lost_during_the_transfer_is_replaced_by_the_other(
    number: signal.Signals,
) -> None:
    async with running(num_prefill=2) as (cluster, client):
        asked = Asked(client, num_tokens=12)
        # Some chunks are read, and their blocks travel while the next are being read.
        victim = (await worker_where(cluster, Role.PREFILL, 32)).hello.worker_id
        cluster.process(victim).signal(number)
        lost_s = time.monotonic()
        helper = await asked.assert_exact()
        assert time.monotonic() - lost_s < DETECT_S + 2 * READ_S
        assert helper not in ("", victim)


async def test_prefill_worker_killed_after_the_transfer_changes_nothing() -> None:
    async with running(num_prefill=1) as (cluster, client):
        asked = Asked(client, num_tokens=200)
        await asked.has_begun.wait()
        await worker_where(cluster, Role.DECODE, 10)  # so all blocks are there
        cluster.process("prefill-0").signal(signal.SIGKILL)
        assert await asked.assert_exact() == "prefill-0"


async def test_decode_worker_told_to_end_first_ends_its_request() -> None:
    async with running(num_prefill=1) as (cluster, client):
        asked = Asked(client, num_tokens=200)
        await worker_where(cluster, Role.DECODE, 10)
        cluster.process("decode-0").signal(signal.SIGTERM)
        await asked.assert_exact()
        event = await asyncio.wait_for(cluster.next_event(), PATIENCE_S)
        assert "decode-0 exited with code 0" in event.message
