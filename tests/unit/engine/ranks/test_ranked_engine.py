"""Rank 0's engine beside a rank at the other end of a socket."""

import asyncio
import socket

from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.ids import BlockId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import Role
from pdserve.domain.rank_place import RankPlace
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.ranks.channel import RankChannel
from pdserve.engine.ranks.crew import Crew, PreparedRanks
from pdserve.engine.ranks.forking import LocalRanks
from pdserve.engine.ranks.frames import Message
from pdserve.engine.ranks.ranked_engine import RankedEngine
from pdserve.engine.timed_engine import TimedEngine
from tests.support.worker_pair import LAYOUT, demo_files

LATE_S = 0.2
NO_TIME = StepCoefficients(
    fixed_s=0.0,
    prefill_token_s=0.0,
    prefill_attention_s=0.0,
    decode_token_s=0.0,
    decode_context_token_s=0.0,
)


async def test_time_of_a_step_is_that_of_its_slowest_rank_and_of_what_ranks_say() -> None:
    async def compute(_: Message) -> Message:
        await asyncio.sleep(LATE_S)
        return Message()

    ours, theirs = socket.socketpair()
    to_other, to_us = (
        await RankChannel.open(ours, "rank 1"),
        await RankChannel.open(theirs, "rank 0"),
    )
    to_us.handle("step", compute)
    part = TimedEngine(
        demo_files(),
        block_size=LAYOUT.block_size,
        num_blocks=8,
        coefficients=NO_TIME,
        layout=LAYOUT,
    )
    crew = Crew(
        settings=WorkerSettings(worker_id="p0", role=Role.PREFILL, engine=EngineSettings(tp=2)),
        prepared=PreparedRanks(files=demo_files(), load=lambda *_: part, local=LocalRanks([])),
        on_stop=lambda: None,
        channels={1: to_other},
    )
    engine = RankedEngine(part, RankPlace(rank=0, tp=2), crew, step_s=60.0)
    sequence = SequenceStep(
        token_ids=(5, 6),
        start=0,
        block_table=(BlockId(0),),
        sample=SampleStep(params=SamplingParams(), token_index=0),
    )
    try:
        alone = await part.step(StepBatch((sequence,)))
        result = await engine.step(StepBatch((sequence,)))
    finally:
        engine.close()
        await to_other.close()
        await to_us.close()
    assert result.sampled == alone.sampled
    assert alone.elapsed_s < LATE_S <= result.elapsed_s
