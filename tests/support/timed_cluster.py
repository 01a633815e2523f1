"""A trace of requests to a deployment's simulated cluster, with timed engines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from deploy.deployment import Deployment
from deploy.simulated.cluster import SimulatedCluster, open_simulated_cluster
from pdserve.config.processes import EngineSettings
from pdserve.domain.errors import Refused
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Finished
from pdserve.engine.contract import Engine
from router.requests import Chunk, GenerateCall
from tests.support.worker_pair import BLOCK_SIZE, borrow_engine

FIRST_PROMPT_TOKEN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a trace."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of it; times since it was sent, empty names of one that was refused."""

    reader: str = ""
    writer: str = ""
    ttft_s: float = float("inf")
    total_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class TimedCluster:
    """Serves traces."""

    cluster: SimulatedCluster

    async def run(self, asks: Sequence[Ask]) -> list[Outcome]:
        """Send each request when its time has come; returns once all have ended."""
        start_s = asyncio.get_running_loop().time()

        async def serve(number: int, ask: Ask) -> Outcome:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(start_s + ask.at_s - loop.time())
            sent_s = loop.time()
            first_s: list[float] = []

            async def take(chunk: Chunk) -> None:
                if chunk.tokens and not first_s:
                    first_s.append(loop.time())

            try:
                finished = await self.cluster.router.dispatcher.run(_call(number, ask), take)
            except Refused:
                return Outcome()
            return _outcome(finished, first_s[0] - sent_s, loop.time() - sent_s)

        return await asyncio.gather(*(serve(number, ask) for number, ask in enumerate(asks)))


@contextlib.asynccontextmanager
async def open_timed_cluster(deployment: Deployment) -> AsyncIterator[TimedCluster]:
    """All workers registered and linked; nothing is held anywhere when the block is left."""
    async with open_simulated_cluster(deployment, open_engine=_spare_engine) as cluster:
        yield TimedCluster(cluster)
        assert cluster.router.ledger.is_empty


def _spare_engine(settings: EngineSettings) -> Engine:
    assert settings.block_size == BLOCK_SIZE, settings.block_size
    assert settings.coefficients is not None
    return borrow_engine(settings.host_num_blocks, settings.coefficients.to_coefficients())


def _call(number: int, ask: Ask) -> GenerateCall:
    first = FIRST_PROMPT_TOKEN + number
    return GenerateCall(
        prompt=(first,) * ask.num_prompt_tokens,
        sampling=SamplingParams(max_tokens=ask.num_output_tokens),
        label=f"r{number}",
    )


def _outcome(finished: Finished, ttft_s: float, total_s: float) -> Outcome:
    timeline = finished.timeline
    assert timeline.attempts == 1
    return Outcome(
        reader=timeline.prefill_worker or timeline.decode_worker,
        writer=timeline.decode_worker,
        ttft_s=ttft_s,
        total_s=total_s,
    )
