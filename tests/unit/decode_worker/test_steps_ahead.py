"""Steps that are begun before the tokens of the one before are known change no answer."""

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import structlog

from decode_worker.decode_loop import DecodeLoop
from decode_worker.requests import DecodeRequest
from decode_worker.stream import Answer, RouterOutbox
from deploy.simulated.virtual_time import virtual
from pdserve.domain.ids import RequestId
from pdserve.domain.messages import Submit
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.contract import Engine, SequenceStep, StepBatch, StepResult
from pdserve.engine.step_table import StepTable
from pdserve.engine.timed_engine import TimedEngine
from pdserve.observe.watch import DecodeWatch
from pdserve.rpc.streams import memory_stream_pair
from tests.support.worker_pair import BLOCK_SIZE, COEFFICIENTS, borrow_engine, demo_tokenizer

NUM_BLOCKS, NUM_REQUESTS = 24, 12  # blocks that are given back are taken at once


class AheadEngine:
    """`inner`, which knows what follows what as a device does: by the draws of the step before.

    Steps of several requests whose number is in `fails` raise; what follows them gets the draws of
    another step.
    """

    looks_ahead = True

    def __init__(self, inner: TimedEngine, fails: frozenset[int] = frozenset()) -> None:
        self.spec, self.kv = inner.spec, inner.kv
        self._inner, self._fails = inner, fails
        self._turn = asyncio.Lock()
        self._drawn: list[int] = []
        self.at_end: Callable[[], object] = lambda: None
        self.num_under_way = 0
        self.num_begun = Counter[int]()  # by how many were under way then

    async def step(self, batch: StepBatch) -> StepResult:
        number = self.num_begun.total()
        self.num_begun[self.num_under_way] += 1
        self.num_under_way += 1
        try:
            async with self._turn:
                known = StepBatch(tuple(self._known(each) for each in batch.sequences))
                result = await self._inner.step(known)
                self.at_end()
                if number in self._fails and len(batch.sequences) > 1:
                    raise RuntimeError("the step failed")
                both = zip(result.sampled, batch.sequences, strict=True)
                self._drawn = [
                    _token_id(drawn) if each.sample.is_drawn_on_device else 0
                    for drawn, each in both
                    if each.sample is not None
                ]
                return result
        finally:
            self.num_under_way -= 1

    def _known(self, each: SequenceStep) -> SequenceStep:
        if each.follows is None:
            return each
        token_id = self._drawn[each.follows] if each.follows < len(self._drawn) else 0
        return SequenceStep(
            token_ids=(token_id,),
            start=each.start,
            block_table=each.block_table,
            sample=each.sample,
            num_tokens=each.num_tokens,
        )

    def close(self) -> None:
        self._inner.close()


def _token_id(drawn: Any) -> int:
    return drawn.token_id if isinstance(drawn, SampledToken) else 0


def sampling_of(chooser: Random, *, is_rare: bool) -> SamplingParams:
    """Answers of a known length, and answers that end anywhere."""
    stops = chooser.sample(range(2048), 170) if chooser.random() < 0.6 else []
    return SamplingParams(
        max_tokens=chooser.randint(1, 24),
        stop_token_ids=tuple(stops),
        logprobs=2 if is_rare and chooser.random() < 0.3 else None,
        min_tokens=chooser.randint(1, 6) if is_rare and chooser.random() < 0.3 else 0,
        seed=chooser.randrange(99),
    )


async def request_of(
    chooser: Random, place: int, pool: BlockPool, freed: asyncio.Event, *, is_rare: bool
) -> DecodeRequest:
    sampling = sampling_of(chooser, is_rare=is_rare)
    prompt = tuple(chooser.randrange(3, 500) for _ in range(chooser.randint(1, 3 * BLOCK_SIZE)))
    request = DecodeRequest(
        Submit(
            request_id=RequestId(str(place)),
            attempt=1,
            prompt_token_ids=prompt,
            sampling=sampling,
            deadline_s=60.0,
            prefill_targets=(),
        ),
        answer=Answer(sampling, eos_token_ids=(), detokenizer=demo_tokenizer().detokenizer()),
        outbox=RouterOutbox(memory_stream_pair()[0]),
        names=(),
        clock=asyncio.get_running_loop().time,
    )
    while (table := pool.reserve(-(-request.max_num_kv_tokens // BLOCK_SIZE))) is None:
        freed.clear()
        await freed.wait()
    request.table = StepTable(table, freed.set)
    return request


async def serve(
    seed: int, make: Callable[[TimedEngine], Engine], *, is_rare: bool, cancels: bool
) -> tuple[list[list[int]], DecodeLoop]:
    """What each request is answered; of those that leave early, what they had by then."""
    chooser, pool, freed = Random(seed), BlockPool(NUM_BLOCKS), asyncio.Event()
    engine = make(borrow_engine(NUM_BLOCKS))
    clock = asyncio.get_running_loop().time
    loop = DecodeLoop(
        engine, coefficients=COEFFICIENTS, max_step_tokens=16, clock=clock, watch=DecodeWatch()
    )
    running = asyncio.create_task(loop.run())

    async def answer(place: int) -> list[int]:
        own = Random(f"{seed} {place}")
        await asyncio.sleep(own.uniform(0, 0.3))
        request = await request_of(own, place, pool, freed, is_rare=is_rare)
        patience_s = own.uniform(0, 0.2) if cancels and own.random() < 0.5 else None
        loop.join(request)
        try:
            await asyncio.wait([request.finished], timeout=patience_s)
        finally:
            loop.leave(request)
            assert request.table is not None
            request.table.release()
        request.finished.cancel()
        return request.token_ids[request.num_prompt_tokens :]

    places = chooser.sample(range(NUM_REQUESTS), NUM_REQUESTS)
    answers = await asyncio.gather(*(answer(place) for place in places))
    await asyncio.sleep(1.0)
    assert pool.usage().is_idle
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])
    engine.close()
    ordered = sorted(zip(places, answers, strict=True))
    return [tokens for _, tokens in ordered], loop


@pytest.mark.parametrize("is_rare", [False, True], ids=["device draws", "host draws"])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_one_step_after_the_other(seed: int, is_rare: bool) -> None:
    made: list[AheadEngine] = []

    def make(inner: TimedEngine) -> AheadEngine:
        made.append(AheadEngine(inner))
        return made[0]

    @virtual
    async def run() -> None:
        expected, _ = await serve(seed, lambda inner: inner, is_rare=is_rare, cancels=False)
        answers, loop = await serve(seed, make, is_rare=is_rare, cancels=False)
        assert answers == expected
        assert any(len(answer) > 8 for answer in answers)
        assert loop.num_tokens == sum(map(len, answers))

    run()
    begun = made[0].num_begun
    assert set(begun) == {0, 1}, "one step under way and one behind it"
    assert begun[1] > begun[0] or is_rare


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_leave_in_the_middle_harm_no_other(seed: int) -> None:
    @virtual
    async def run() -> None:
        whole, _ = await serve(seed, lambda inner: inner, is_rare=False, cancels=False)
        answers, _ = await serve(seed, AheadEngine, is_rare=False, cancels=True)
        for answer, expected in zip(answers, whole, strict=True):
            assert answer == expected[: len(answer)]
        assert any(
            len(answer) < len(expected) for answer, expected in zip(answers, whole, strict=True)
        )

    run()


@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_fails_is_computed_again_with_the_one_behind_it(seed: int) -> None:
    fails = frozenset(Random(seed).sample(range(60), 8))

    @virtual
    async def run() -> None:
        expected, _ = await serve(seed, lambda inner: inner, is_rare=False, cancels=False)
        with structlog.testing.capture_logs():
            answers, _ = await serve(
                seed, lambda inner: AheadEngine(inner, fails), is_rare=False, cancels=False
            )
        assert answers == expected

    run()


@virtual
async def test_the_last_possible_token_is_the_end_and_nothing_is_computed_behind_it() -> None:
    pool, engine = BlockPool(NUM_BLOCKS), AheadEngine(borrow_engine(NUM_BLOCKS))
    clock = asyncio.get_running_loop().time
    loop = DecodeLoop(engine, coefficients=COEFFICIENTS, max_step_tokens=64, clock=clock)
    running = asyncio.create_task(loop.run())
    chooser, freed = Random(1), asyncio.Event()
    request = await request_of(chooser, 0, pool, freed, is_rare=False)
    while request.submit.sampling.stop_token_ids:
        assert request.table is not None
        request.table.release()
        request = await request_of(chooser, 0, pool, freed, is_rare=False)
    loop.join(request)
    await request.finished
    await asyncio.sleep(0.1)
    assert request.num_output_tokens == request.submit.sampling.max_tokens
    assert loop.num_steps == engine.num_begun.total() == request.num_output_tokens
    running.cancel()
    await asyncio.wait([running])
    engine.close()


@virtual
async def test_blocks_of_a_request_that_leaves_wait_for_both_steps() -> None:
    pool, freed = BlockPool(NUM_BLOCKS), asyncio.Event()
    engine, held = AheadEngine(borrow_engine(NUM_BLOCKS)), list[int]()
    engine.at_end = lambda: held.append(pool.usage().held)
    clock = asyncio.get_running_loop().time
    loop = DecodeLoop(engine, coefficients=COEFFICIENTS, max_step_tokens=64, clock=clock)
    running = asyncio.create_task(loop.run())
    request = await request_of(Random(3), 0, pool, freed, is_rare=False)
    assert request.submit.sampling.max_tokens > 2
    loop.join(request)
    await asyncio.sleep(1e-6)
    assert engine.num_under_way == 2
    loop.leave(request)
    assert request.table is not None
    request.table.release()
    await freed.wait()
    assert len(held) == 2
    assert all(held)
    assert pool.usage().is_idle
    running.cancel()
    await asyncio.wait([running])
    engine.close()
