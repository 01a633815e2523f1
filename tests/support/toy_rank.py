"""Ranks that compute next to nothing, with an engine of them all: what remains is how they act.

    python -m tests.support.toy_rank SCENARIO TP PP [RANK]

A rank's state is a sum over its stage's ranks of what was handed over, the tokens and its past, so
that a rank which misses a step, or takes it twice, changes every later token.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import uvloop

from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.errors import LocalFault
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import (
    Drawn,
    Engine,
    SampleStep,
    SequenceStep,
    StepBatch,
    StepLimits,
    StepResult,
)
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import kv_layout
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.threads import run_to_end
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.logging import process_log
from pdserve.worker.starting import opened_engine, prepare_ranks

WEIGHTS = 1_000_003


class ToyPart:
    """Satisfies `Engine`, for one rank."""

    looks_ahead = False

    def __init__(self, files: ModelFiles, settings: EngineSettings, group: RankGroup) -> None:
        place = group.place
        whole = kv_layout(files.config, block_size=settings.block_size, dtype="float32")
        self.spec = EngineSpec(
            kind="torch",
            model_name=files.name,
            model_hash=files.model_hash,
            tokenizer_hash=Tokenizer.load(files.model_dir).digest,
            vocab_size=files.vocab_size,
            max_context_tokens=files.max_context_tokens,
            eos_token_ids=files.eos_token_ids,
            layout=whole,
            tp=settings.tp,
            pp=settings.pp,
        )
        layout = self.spec.sharded_layout.rank(place.rank).layout
        self.kv = KvMemory(layout, settings.host_num_blocks)
        self._place = place
        self._group = group
        self._state = torch.zeros(1, dtype=torch.float64)
        self._thread = ThreadPoolExecutor(1)
        self.fails_in_step = 0
        self._num_steps = 0

    async def step(self, batch: StepBatch) -> StepResult:
        return await run_to_end(lambda _: self._compute(batch), self._thread)

    def close(self) -> None:
        self._thread.shutdown()
        self.kv.close()

    def _compute(self, batch: StepBatch) -> StepResult:
        self._num_steps += 1
        if self._num_steps == self.fails_in_step:
            raise ValueError("a secret")
        handed = torch.zeros(1, dtype=torch.float64)
        if not self._place.is_first_stage:
            handed = self._group.receive(handed)
        tokens = sum(sum(each.token_ids) + each.start for each in batch.sequences)
        own = (self._state * 31 + handed + tokens + self._place.rank) % WEIGHTS
        self._state = self._group.all_reduce(own)
        if not self._place.is_last_stage:
            self._group.send(self._state)
        if not self._place.draws:
            return StepResult((None,) * len(batch.sequences), 0.0)
        sampled: list[Drawn | None] = [
            SampledToken(int(self._state.item() + row) % self.spec.vocab_size)
            if each.sample
            else None
            for row, each in enumerate(batch.sequences)
        ]
        return StepResult(tuple(sampled), 0.0)


async def _cancelled_step(engine: Engine) -> None:
    """What a step that is cancelled has done: all of it, on every rank, before it raises."""
    running = asyncio.create_task(engine.step(_batch()))
    await asyncio.sleep(0)  # it begins
    await asyncio.sleep(0)
    running.cancel()
    try:
        await running
    except asyncio.CancelledError:
        print("cancelled", flush=True)
    result = await engine.step(_batch())
    print([drawn.token_id for drawn in result.sampled if isinstance(drawn, SampledToken)])


async def _steps(engine: Engine) -> None:
    for _ in range(2):
        result = await engine.step(_batch())
        print([drawn.token_id for drawn in result.sampled if isinstance(drawn, SampledToken)])


def _batch() -> StepBatch:
    sample = SampleStep(params=SamplingParams(), token_index=0)
    return StepBatch((SequenceStep(token_ids=(7,), start=0, block_table=(), sample=sample),))


def main() -> None:
    """`SCENARIO TP PP [RANK]`: RANK fails in its second step, or in its loading."""
    scenario, tp, pp = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    bad_rank = int(sys.argv[4]) if len(sys.argv) > 4 else -1

    def load(
        files: ModelFiles, settings: EngineSettings, limits: StepLimits, group: RankGroup
    ) -> Engine:
        if scenario == "load" and group.place.rank == bad_rank:
            raise LocalFault("the disk is full of holes")
        if limits != StepLimits(max_num_requests=7, max_num_tokens=99):
            raise LocalFault(f"other limits than the worker's: {limits}")
        part = ToyPart(files, settings, group)
        part.fails_in_step = 2 if group.place.rank == bad_rank else 0
        return part

    engine = {"tp": tp, "pp": pp, "num_blocks": 16}
    settings = WorkerSettings.model_validate(
        {
            "role": "decode",
            "worker_id": "decode-0",
            "engine": engine,
            "max_num_requests": 7,
            "max_step_tokens": 99,
        }
    )
    prepared = prepare_ranks(settings, load=load)

    async def run() -> None:
        async with opened_engine(settings, prepared) as engine:
            await (_cancelled_step if scenario == "cancel" else _steps)(engine)

    with process_log(level="error", file=None):
        try:
            uvloop.run(run())
        except LocalFault as fault:
            print(fault.message)
    os._exit(0)


if __name__ == "__main__":
    main()
