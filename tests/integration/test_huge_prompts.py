"""A real router takes huge prompts, and nobody else notices."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
from grpc.aio import EOF  # type: ignore[attr-defined]

from pdserve.config.timers import Timers
from pdserve.domain.messages import Submit, WorkerHello
from pdserve.engine.tokenizer import Tokenizer
from pdserve.models import DEMO_MODEL_DIR
from tests.integration.test_router import (
    DONE,
    Cluster,
    ScriptedWorker,
    error_of,
    failure,
    is_usable,
    run_cluster,
    soon,
)
from tests.integration.test_tokenizing import prose
from tests.support.loop_turns import longest_s, watch_turns
from tests.unit.router.builders import COEFFICIENTS, make_load

TOKENIZER = Tokenizer.load(DEMO_MODEL_DIR)
NUM_CHARS = 700_000
MAX_CONTEXT_TOKENS = 4_000_000
PATIENCE_S = 120.0
MAX_TURN_S = 0.05


class AnsweringWorker(ScriptedWorker):
    """Has room for prompts of millions of tokens; answers each request with one token."""

    def __init__(self) -> None:
        super().__init__("d0")
        self.taken: list[Submit] = []

    def hello(self, **changes: Any) -> WorkerHello:
        sizes = {
            "max_context_tokens": MAX_CONTEXT_TOKENS,
            "num_blocks": MAX_CONTEXT_TOKENS,
            "coefficients": replace(COEFFICIENTS, prefill_token_s=0.0),  # nobody is refused a wait
        }
        return super().hello(**{**sizes, **changes})

    async def answer(self) -> None:
        while True:
            submit = await self.submits.get()
            self.taken.append(submit)
            await self.say(submit, 0, 1, end=DONE)

    async def report(self) -> None:
        for sequence in range(1, 1_000_000):
            await self.membership.send(make_load(sequence=sequence))
            await asyncio.sleep(0.3)


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[Cluster, AnsweringWorker]]:
    async with run_cluster(timers=Timers()) as cluster:
        worker = AnsweringWorker()
        cluster.workers.append(worker)
        await worker.start(cluster.served)
        tasks = [asyncio.create_task(work) for work in (worker.answer(), worker.report())]
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield cluster, worker
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def one_answer(call: Any) -> int:
    """Tokens of a whole good answer."""
    num_tokens = 0
    while (chunk := await call.read()) is not EOF:
        num_tokens += len(chunk.tokens)
    return num_tokens


async def test_prompts_of_others_pass_huge_ones_and_no_worker_seems_lost() -> None:
    huge = [prose(NUM_CHARS, seed) for seed in range(2)]
    middling = prose(20_000)
    async with served() as (cluster, worker), watch_turns() as turns_s:
        calls = [cluster.generate(text=text) for text in huge]
        answers = [asyncio.create_task(one_answer(call)) for call in calls]
        gone = [cluster.generate(text=prose(NUM_CHARS, 9)) for _ in range(3)]
        late = asyncio.create_task(
            error_of(cluster.generate(text=prose(NUM_CHARS, 8), timeout=0.3))
        )
        num_short = 0
        while num_short < 20:
            for text in ("def f(x):", middling):
                assert await soon(one_answer(cluster.generate(text=text))) == 1
                num_short += 1
            assert is_usable(cluster.router, "d0")
            if num_short == 10:
                for call in gone:
                    call.cancel()
        # They came after the huge ones and were answered before them.
        assert len(worker.taken) == num_short
        assert await asyncio.gather(*answers) == [1, 1]
        assert longest_s(turns_s) < MAX_TURN_S
        assert (await late).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        long_ones = {submit.prompt_token_ids for submit in worker.taken[num_short:]}
        assert long_ones == {TOKENIZER.encode(text) for text in huge}


async def test_prompts_of_a_million_token_ids_hold_up_nothing() -> None:
    ids = [index % 2000 for index in range(1_400_000)]
    turns_s: list[float] = []
    async with served() as (cluster, worker):
        for _ in range(2):
            call = cluster.generate(token_ids={"ids": ids})
            async with watch_turns() as turns_of_one_s:
                assert await soon(one_answer(call)) == 1
            turns_s += turns_of_one_s
        assert longest_s(turns_s) < MAX_TURN_S
        assert worker.taken[0].prompt_token_ids == tuple(ids)


async def test_text_beyond_the_context_is_refused_before_it_is_tokenised() -> None:
    async with run_cluster() as cluster:
        await cluster.worker()  # a context of 1,024 tokens
        ended = await failure(cluster.generate(text="word " * 100_000))
        assert (ended.reason, ended.can_retry) == ("CONTEXT_TOO_LONG", False)
        assert ended.violations == ["text"]
        assert "1016 tokens for the prompt" in ended.message
        assert "got 500000" in ended.message
