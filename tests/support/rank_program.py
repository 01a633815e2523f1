"""Answers to prompts by a worker's engine of real rank processes, without a worker around it.

    python -m tests.support.rank_program JOBS.json

JOBS lists settings of workers; for each, in a process of its own, prompts are answered greedily and
sampled, in mixed chunks. Prints a line of JSON for each job: a list of tokens for every request.
"""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.ids import BlockId
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import Engine, SampleStep, SequenceStep, StepBatch
from pdserve.engine.opening import open_engine
from pdserve.engine.ranks.forking import close_all_but
from pdserve.observe.logging import configure_logging
from pdserve.worker.starting import opened_engine, prepare_ranks

CHUNK = 13
LATE_EVERY = 3  # steps between the arrivals of two requests


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    table: tuple[BlockId, ...]
    arrives_at: int
    num_computed: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return len(self.output) == self.params.max_tokens

    def next_step(self) -> SequenceStep:
        known = self.prompt + self.output
        end = min(self.num_computed + CHUNK, len(known))
        sample = SampleStep(params=self.params, token_index=len(self.output))
        return SequenceStep(
            token_ids=tuple(known[self.num_computed : end]),
            start=self.num_computed,
            block_table=self.table,
            sample=sample if end == len(known) else None,
            num_tokens=len(known),
        )


async def answer_all(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Continuous batching of requests that arrive one after the other."""
    for step in itertools.count():
        active = [each for each in requests if each.arrives_at <= step and not each.is_over]
        if not active:
            break
        batch = StepBatch(tuple(each.next_step() for each in active))
        result = await engine.step(batch)
        for each, sequence, drawn in zip(active, batch.sequences, result.sampled, strict=True):
            each.num_computed += len(sequence.token_ids)
            if drawn is not None:
                assert isinstance(drawn, SampledToken), drawn
                each.output.append(drawn.token_id)
    return [each.output for each in requests]


def requests_of(
    prompts: Sequence[Sequence[int]], num_tokens: int, block_size: int
) -> list[Request]:
    """Each prompt greedily, and sampled in a way of its own."""
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_k": 40, "top_p": 0.9},
    ]
    requests: list[Request] = []
    first = 0
    for index, (prompt, way) in enumerate(itertools.product(prompts, ways)):
        num_blocks = -(-(len(prompt) + num_tokens) // block_size)
        params = SamplingParams(max_tokens=num_tokens, seed=index, **way)
        table = tuple(BlockId(block) for block in range(first + num_blocks - 1, first - 1, -1))
        first += num_blocks
        requests.append(Request(list(prompt), params, table, arrives_at=LATE_EVERY * (index // 2)))
    return requests


def run_job(job: dict[str, Any], output: int) -> None:
    settings = WorkerSettings.model_validate(job["settings"])
    prepared = prepare_ranks(settings)
    configure_logging(level="error", stream=sys.stderr)

    async def run() -> list[list[int]]:
        requests = requests_of(job["prompts"], job["num_tokens"], settings.engine.block_size)
        async with opened_engine(settings, prepared) as engine:
            return await answer_all(engine, requests)

    os.write(output, json.dumps(uvloop.run(run())).encode() + b"\n")


def main(path: Path) -> None:
    """Import once, then a fork for each job, as a fork server does it."""
    open_engine(EngineSettings(num_blocks=1)).close()
    for job in json.loads(path.read_text(encoding="utf-8")):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            close_all_but(0, 1, 2, writing)
            run_job(job, writing)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answers:
            print(answers.read().strip(), flush=True)
        _, status = os.waitpid(pid, 0)
        if status != 0:
            sys.exit(f"{job['settings']}: {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
