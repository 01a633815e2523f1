"""Measuring a running cluster through its public service: what reading, decoding and passing on
take when nothing else is asked of it."""

import asyncio
import contextlib
import math
import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.client.inference import InferenceClient
from pdserve.client.values import Finished, Model, Sampling
from pdserve.client.workload import make_prompt
from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients, StepShape, num_attention_pairs
from pdserve.domain.messages import ClusterState, Role, WorkerHello
from placement.fitting import (
    FittedProfile,
    Handoff,
    Interference,
    Limits,
    Phase,
    StepPoint,
    compare,
    fit_link,
    fit_phase,
)

LENGTHS = (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32)
MAX_NUM_LENGTHS = 7
NUM_WINDOW_STEPS = 32
MIN_WINDOW_STEPS = 6
LONE_OUTPUT_TOKENS = 6
BURST = 6
BESIDE_PROMPT_TOKENS, BESIDE_OUTPUT_TOKENS = 256, 3
BESIDE_ANSWER_PROMPT_TOKENS, BESIDE_TOKENS = 96, 600
LOCAL_PREFILL_TOKENS = 64
"""Shorter prompts are read by the decode worker itself, by its default."""

Advance = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """What to ask. Every figure is the median of `num_rounds`."""

    num_rounds: int = 5
    max_batch: int = 16

    def lengths(self, max_context_tokens: int) -> tuple[int, ...]:
        most = max_context_tokens - LONE_OUTPUT_TOKENS
        fits = [length for length in LENGTHS if length <= most]
        step = max(1, math.ceil(len(fits) / MAX_NUM_LENGTHS))
        return tuple(fits[::-1][::step][::-1])

    def batches(self, max_num_requests: int) -> tuple[int, ...]:
        most = min(self.max_batch, max_num_requests)
        return tuple(batch for batch in BATCHES if batch <= most)

    def num_probes(self, model: Model, workers: "Workers") -> int:
        num_batches = len(self.batches(workers.decode[0].max_num_requests))
        return 2 * len(self.lengths(model.max_context_tokens)) + 2 * num_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The workers of a cluster, told apart; raises `LocalFault` where one kind is missing."""

    prefill: tuple[WorkerHello, ...]
    decode: tuple[WorkerHello, ...]

    @classmethod
    def of(cls, state: ClusterState) -> "Workers":
        alive = [worker.hello for worker in state.workers if worker.health == "alive"]
        found = cls(
            prefill=tuple(hello for hello in alive if hello.role is Role.PREFILL),
            decode=tuple(hello for hello in alive if hello.role is Role.DECODE),
        )
        for role, hellos in (("prefill", found.prefill), ("decode", found.decode)):
            if not hellos:
                raise LocalFault(f"the cluster has no {role} worker that is alive")
        return found

    def reported(self) -> dict[Phase, StepCoefficients]:
        """What the workers measured at their start; of several alike, the first's."""
        return {"prefill": self.prefill[0].coefficients, "decode": self.decode[0].coefficients}

    def limits(self) -> Limits:
        prefill, decode = self.prefill[0], self.decode[0]
        return Limits(
            prefill_kv_tokens=prefill.num_blocks * prefill.block_size,
            decode_kv_tokens=decode.num_blocks * decode.block_size,
            kv_bytes_per_token=decode.block_bytes / decode.block_size,
            block_size=decode.block_size,
            max_step_tokens=prefill.max_step_tokens,
            max_num_requests=decode.max_num_requests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answer as the client saw it: when it was asked for and when each token came."""

    prompt_tokens: int
    sent_s: float
    token_s: tuple[float, ...]
    finished: Finished

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def handoff_s(self) -> float:
        """The part of TTFT in which no worker read or queued the prompt."""
        timeline = self.finished.timeline
        return max(0.0, self.ttft_s - timeline.prefill_queue_s - timeline.prefill_s)

    @property
    def was_handed_off(self) -> bool:
        return bool(self.finished.timeline.prefill_worker) and (
            self.finished.usage.cached_prompt_tokens == 0
        )


@dataclass(slots=True)
class Prober:
    """Asks a cluster that serves nobody else."""

    client: InferenceClient
    model: Model
    workers: Workers
    plan: ProbePlan = field(default_factory=ProbePlan)
    advance: Advance = lambda text: None
    # Prompts of an earlier run must not be found in a prefix cache.
    _seed: int = field(default_factory=lambda: secrets.randbits(48))

    @property
    def limits(self) -> Limits:
        return self.workers.limits()

    async def measure(self) -> FittedProfile:
        """Warm up, measure, fit. Takes about half a minute for the demo model."""
        await asyncio.gather(*(self._ask(self._prompt(200), 16) for _ in range(4)))
        lengths = self.plan.lengths(self.model.max_context_tokens)
        answers = {length: await self._lone(length) for length in lengths}
        everyone = [each for group in answers.values() for each in group]
        if not everyone:
            raise LocalFault("no prompt was read by a prefill worker; the cluster has other load?")
        handoff_s = statistics.median(each.handoff_s for each in everyone)
        points = [
            _prefill_point(length, group, self.limits.max_step_tokens)
            for length, group in answers.items()
            if group
        ]
        for length in lengths:
            points.append(await self._burst(length, handoff_s))
        points += await self._decode_points()
        reported = self.workers.reported()
        fitted: dict[Phase, StepCoefficients] = {
            "prefill": fit_phase(points, "prefill"),
            "decode": fit_phase(points, "decode"),
        }
        interference = await self._interference(answers, fitted["decode"])
        return FittedProfile(
            model=self.model.name,
            prefill=fitted["prefill"],
            decode=fitted["decode"],
            handoff=self._handoff(answers, handoff_s, fitted["decode"]),
            limits=self.limits,
            interference=interference,
            residuals=compare(points, fitted, reported),
        )

    async def _lone(self, length: int) -> list[Answered]:
        self.advance(f"prompt of {length} tokens")
        answers = [
            await self._ask(self._prompt(length), LONE_OUTPUT_TOKENS)
            for _ in range(self.plan.num_rounds)
        ]
        return [each for each in answers if each.was_handed_off]

    async def _burst(self, length: int, handoff_s: float) -> StepPoint:
        """Prompts that come together: what a step costs when the next one waits for it."""
        self.advance(f"{BURST} prompts of {length} tokens at once")
        num = BURST * len(self.workers.prefill)
        spans = []
        for _ in range(self.plan.num_rounds):
            answers = await asyncio.gather(
                *(self._ask(self._prompt(length), 1) for _ in range(num))
            )
            begun_s = min(each.sent_s for each in answers)
            spans.append(max(each.token_s[0] for each in answers) - begun_s - handoff_s)
        # The first prompt is alone in its step: the others come while it is read.
        num_steps = _num_steps(length, self.limits.max_step_tokens) + _num_steps(
            (BURST - 1) * length, self.limits.max_step_tokens
        )
        return StepPoint(
            phase="prefill",
            label=f"{BURST} prompts of {length} at once",
            shape=StepShape(
                num_prefill_tokens=BURST * length,
                num_prefill_pairs=BURST * num_attention_pairs(0, length),
            ),
            num_steps=num_steps,
            measured_s=statistics.median(spans),
        )

    async def _decode_points(self) -> list[StepPoint]:
        points = []
        context = self.model.max_context_tokens
        hello = self.workers.decode[0]
        room = hello.num_blocks * hello.block_size
        for batch in self.plan.batches(hello.max_num_requests):
            num_tokens = NUM_WINDOW_STEPS + 2 * batch
            for prompt_tokens in (min(96, context // 4), min(context // 2, 2048)):
                self.advance(f"{batch} answers after {prompt_tokens} tokens")
                if (
                    prompt_tokens + num_tokens > context
                    or batch * (prompt_tokens + num_tokens) > room
                ):
                    continue
                points += await self._batch(batch, prompt_tokens, num_tokens)
        return points

    async def _batch(self, batch: int, prompt_tokens: int, num_tokens: int) -> list[StepPoint]:
        """Steps of `batch` answers side by side at each decode worker; empty where they did not
        overlap for long enough."""
        num = batch * len(self.workers.decode)
        by_size: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        prompts = [self._prompt(prompt_tokens) for _ in range(num)]
        # Read before: the decode workers then have the prompts, and all answers begin together.
        await asyncio.gather(*(self._ask(prompt, 1) for prompt in prompts))
        for _ in range(self.plan.num_rounds):
            answers = await asyncio.gather(*(self._ask(prompt, num_tokens) for prompt in prompts))
            for group in _by_decode_worker(answers).values():
                if (window := _window(group)) is not None:
                    by_size[len(group)].append(window)
        return [
            StepPoint(
                phase="decode",
                label=f"{size} answers, context {round(statistics.median(c for _, c in windows))}",
                shape=StepShape(
                    num_decodes=size,
                    num_decode_context_tokens=round(
                        size * statistics.median(c for _, c in windows)
                    ),
                ),
                measured_s=statistics.median(step_s for step_s, _ in windows),
            )
            for size, windows in by_size.items()
        ]

    async def _interference(
        self, alone: Mapping[int, Sequence[Answered]], decode: StepCoefficients
    ) -> Interference:
        """Prompts one after another while answers are decoded, beside the same prompts alone."""
        length = min((n for n in alone if alone[n]), key=lambda n: abs(n - BESIDE_PROMPT_TOKENS))
        self.advance(f"prompts of {length} tokens beside answers")
        most = self.model.max_context_tokens - BESIDE_ANSWER_PROMPT_TOKENS
        num_tokens = min(most, BESIDE_TOKENS)
        # Its own tokens after the first make the others' steps longer: the step model knows that.
        joined_s = (BESIDE_OUTPUT_TOKENS - 1) * (
            decode.decode_token_s + decode.decode_context_token_s * length
        )
        busy: list[Answered] = []
        stolen: list[float] = []
        for _ in range(self.plan.num_rounds):
            behind = [self._prompt(BESIDE_ANSWER_PROMPT_TOKENS) for _ in self.workers.decode]
            # The same answers undisturbed, at the same moment of a machine that others use as well.
            quiet = await asyncio.gather(*(self._ask(prompt, num_tokens) for prompt in behind))
            steps_s = [found[0] for each in quiet if (found := _window([each])) is not None]
            if not steps_s:
                continue
            alone_s = statistics.median(steps_s)
            tasks = [asyncio.create_task(self._ask(prompt, num_tokens)) for prompt in behind]
            sent = []
            while not any(task.done() for task in tasks):
                sent.append(await self._ask(self._prompt(length), BESIDE_OUTPUT_TOKENS))
            answers = list(await asyncio.gather(*tasks))
            begin_s = max(each.token_s[1] for each in answers)
            end_s = min(each.token_s[-1] for each in answers)
            inside = [one for one in sent if begin_s <= one.sent_s and one.token_s[-1] <= end_s]
            busy += [one for one in inside if one.was_handed_off]
            for window in map(_window, ([each] for each in answers)):
                if window is not None and inside:
                    per_prompt_s = (end_s - begin_s) / len(inside) * len(answers)
                    share = 1 - alone_s / window[0]
                    stolen.append(max(0.0, share * per_prompt_s - joined_s))
        if not busy or not stolen:
            return Interference()
        read_alone_s = statistics.median(one.finished.timeline.prefill_s for one in alone[length])
        read_busy_s = statistics.median(one.finished.timeline.prefill_s for one in busy)
        handoff_alone_s = statistics.median(one.handoff_s for one in alone[length])
        handoff_busy_s = statistics.median(one.handoff_s for one in busy)
        return Interference(
            busy_handoff_s=max(0.0, handoff_busy_s - handoff_alone_s),
            stolen_s=statistics.median(stolen),
            busy_prefill=max(1.0, read_busy_s / read_alone_s),
        )

    def _handoff(
        self, answers: Mapping[int, Sequence[Answered]], handoff_s: float, decode: StepCoefficients
    ) -> Handoff:
        budget = self.limits.max_step_tokens
        gaps = []
        for length, group in answers.items():
            alone = StepShape(num_decodes=1, num_decode_context_tokens=length + 1)
            # What earlier chunks brought has travelled while the last one was read.
            last_chunk = length - (_num_steps(length, budget) - 1) * budget
            for each in group:
                gap_s = each.token_s[1] - each.token_s[0] - decode.step_s(alone)
                gaps.append((last_chunk, gap_s))
        latency_s, token_s = fit_link(gaps, handoff_s, 0.0)
        kv_bytes = self.limits.kv_bytes_per_token
        return Handoff(
            handoff_s=handoff_s,
            link_latency_s=latency_s,
            link_bytes_per_s=kv_bytes / token_s if token_s else 1e15,
        )

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        self._seed += 1
        return make_prompt(num_tokens, vocab_size=self.model.vocab_size, seed=self._seed)

    async def _ask(self, prompt: tuple[int, ...], num_tokens: int) -> Answered:
        sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
        finished: Finished | None = None
        token_s: list[float] = []
        sent_s = time.monotonic()
        stream = self.client.generate(prompt, sampling, model=self.model.name, timeout_s=120.0)
        async with contextlib.aclosing(stream):
            async for chunk in stream:
                token_s += [time.monotonic()] * len(chunk.tokens)
                finished = chunk.finished or finished
        assert finished is not None  # the client raises where the end is missing
        return Answered(
            prompt_tokens=len(prompt), sent_s=sent_s, token_s=tuple(token_s), finished=finished
        )


def _prefill_point(length: int, answers: Sequence[Answered], budget: int) -> StepPoint:
    return StepPoint(
        phase="prefill",
        label=f"prompt of {length}",
        shape=StepShape.of([(0, length)]),
        num_steps=_num_steps(length, budget),
        measured_s=statistics.median(each.finished.timeline.prefill_s for each in answers),
    )


def _num_steps(tokens: int, budget: int) -> int:
    return -(-tokens // budget)


def _by_decode_worker(answers: Sequence[Answered]) -> dict[str, list[Answered]]:
    groups: defaultdict[str, list[Answered]] = defaultdict(list)
    for each in answers:
        groups[each.finished.timeline.decode_worker].append(each)
    return dict(groups)


def _window(group: Sequence[Answered]) -> tuple[float, float] | None:
    """Mean step time and context while all of a group were decoded; None for too few steps."""
    begin_s = max(each.token_s[1] for each in group)
    end_s = min(each.token_s[-1] for each in group)
    counts = [sum(begin_s < at <= end_s for at in each.token_s) for each in group]
    num_steps = statistics.mean(counts)
    if num_steps < MIN_WINDOW_STEPS:
        return None
    contexts = [
        each.prompt_tokens + sum(at <= begin_s for at in each.token_s) + count / 2
        for each, count in zip(group, counts, strict=True)
    ]
    return (end_s - begin_s) / num_steps, statistics.mean(contexts)
