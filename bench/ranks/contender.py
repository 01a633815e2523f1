"""One worker's engine, of all its ranks, that runs steps as it is told.

    python -m bench.ranks.contender SETTINGS.json

Prints `{"ready": true}`; for each line `{"case": ..., "num_steps": ...}` it prints what every step
took in seconds, as seen by rank 0: in all, and in tensor operations between ranks.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import torch
import uvloop
from torch import Tensor

from bench.ranks.cases import batch_of
from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.contract import Engine, StepLimits
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.opening import load_rank_part
from pdserve.engine.rank_group import RankGroup
from pdserve.observe.logging import configure_logging
from pdserve.worker.starting import opened_engine, prepare_ranks


class ClockedGroup:
    """Satisfies `RankGroup`: `inner`, and how long its operations took, waiting included."""

    total_s = 0.0  # of this process: rank 0 is one, with one group

    def __init__(self, inner: RankGroup) -> None:
        self.place: RankPlace = inner.place
        self._inner = inner

    def all_reduce(self, tensor: Tensor) -> Tensor:
        began_s = time.perf_counter()
        result = self._inner.all_reduce(tensor)
        ClockedGroup.total_s += time.perf_counter() - began_s
        return result

    def all_gather(self, tensor: Tensor) -> Tensor:
        began_s = time.perf_counter()
        result = self._inner.all_gather(tensor)
        ClockedGroup.total_s += time.perf_counter() - began_s
        return result

    def least(self, number: int, device: torch.device) -> int:
        return self._inner.least(number, device)

    def send(self, tensor: Tensor) -> None:
        began_s = time.perf_counter()
        self._inner.send(tensor)
        ClockedGroup.total_s += time.perf_counter() - began_s

    def receive(self, tensor: Tensor) -> Tensor:
        began_s = time.perf_counter()
        result = self._inner.receive(tensor)
        ClockedGroup.total_s += time.perf_counter() - began_s
        return result

    def close(self) -> None:
        self._inner.close()


def load_clocked(
    files: ModelFiles, settings: EngineSettings, limits: StepLimits, group: RankGroup
) -> Engine:
    return load_rank_part(files, settings, limits, ClockedGroup(group))


async def run(engine: Engine, case: str, num_steps: int) -> list[dict[str, float]]:
    batch = batch_of(case, engine.spec)
    steps = []
    for _ in range(num_steps):
        communicated_s = ClockedGroup.total_s
        began_s = time.perf_counter()
        await engine.step(batch)
        steps.append(
            {
                "step_s": time.perf_counter() - began_s,
                "group_s": ClockedGroup.total_s - communicated_s,
            }
        )
    return steps


def main() -> None:
    settings = WorkerSettings.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    prepared = prepare_ranks(settings, load=load_clocked)
    os.sched_setaffinity(0, settings.cpus_of_rank(0))
    configure_logging(level="error", stream=sys.stderr)

    async def serve() -> None:
        async with opened_engine(settings, prepared) as engine:
            print(json.dumps({"ready": True}), flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                job = json.loads(line)
                print(json.dumps(await run(engine, job["case"], job["num_steps"])), flush=True)

    uvloop.run(serve())


if __name__ == "__main__":
    main()
