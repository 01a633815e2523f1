"""Measuring a running cluster through its public service: what reading, decoding and passing on
take, first when nothing else is asked of it, then among requests that come as they like."""

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
from pdserve.client.values import Model, Sampling
from pdserve.client.workload import make_prompt
from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients, StepShape, num_attention_pairs
from pdserve.domain.messages import ClusterState, Role, WorkerHello
from pdserve.domain.tokens import Finished
from placement.answered import Answered
from placement.fitted_profile import FittedProfile, Handoff, Limits, Ranks
from placement.fitting import Phase, StepPoint, compare, fit_link, fit_phase
from placement.traffic import LEVELS, Level, Steps, draw_traffic, fit_serving

LENGTHS = (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32)
MAX_NUM_LENGTHS = 7
NUM_WINDOW_STEPS = 32
MIN_WINDOW_STEPS = 6
LONE_OUTPUT_TOKENS = 6
BURST = 6

Advance = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """What to ask. Every figure of a lone probe is the median of `num_rounds`."""

    num_rounds: int = 5
    max_batch: int = 16
    levels: tuple[Level, ...] = LEVELS

    def lengths(self, max_context_tokens: int) -> tuple[int, ...]:
        most = max_context_tokens - LONE_OUTPUT_TOKENS
        fits = [length for length in LENGTHS if length <= most]
        step = max(1, math.ceil(len(fits) / MAX_NUM_LENGTHS))
        return tuple(fits[::-1][::step][::-1])

    def batches(self, max_num_requests: int) -> tuple[int, ...]:
        most = min(self.max_batch, max_num_requests)
        return tuple(batch for batch in BATCHES if batch <= most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The workers of a cluster, told apart; raises `LocalFault` if one kind is missing or mixed."""

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
            kinds = sorted({str(_ranks(hello)) for hello in hellos})
            if len(kinds) > 1:
                raise LocalFault(
                    f"the cluster's {role} workers differ in their ranks: {', '.join(kinds)}; a "
                    "profile is of one kind, so profile a cluster of each"
                )
        return found

    def ranks(self, role: Role) -> Ranks:
        """Of every worker of a role."""
        return _ranks((self.prefill if role is Role.PREFILL else self.decode)[0])

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


def _ranks(hello: WorkerHello) -> Ranks:
    """A worker that says nothing of its KV is of one rank to us."""
    return Ranks(tp=hello.layout.tp, pp=hello.layout.pp) if hello.layout else Ranks()


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
        """Warm up, measure, fit. Takes about a minute for the demo model."""
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
        handoff = self._handoff(answers, handoff_s, fitted["decode"])
        steps = Steps(
            prefill=fitted["prefill"],
            decode=fitted["decode"],
            max_step_tokens=self.limits.max_step_tokens,
            num_prefill=len(self.workers.prefill),
            num_decode=len(self.workers.decode),
            link_token_s=self.limits.kv_bytes_per_token / handoff.link_bytes_per_s,
        )
        served = [each for level in self.plan.levels for each in await self._traffic(level, steps)]
        serving, handoff = fit_serving(served, steps, handoff)
        return FittedProfile(
            model=self.model.name,
            prefill=fitted["prefill"],
            decode=fitted["decode"],
            handoff=handoff,
            limits=self.limits,
            serving=serving,
            prefill_ranks=self.workers.ranks(Role.PREFILL),
            decode_ranks=self.workers.ranks(Role.DECODE),
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

    async def _traffic(self, level: Level, steps: Steps) -> list[Answered]:
        """Answers to requests that leave at their planned times, whatever became of others."""
        self._seed += 1
        sent = draw_traffic(
            level,
            steps,
            max_context_tokens=self.model.max_context_tokens,
            max_batch=min(self.plan.max_batch, self.limits.max_num_requests),
            seed=self._seed,
        )
        self.advance(f"{len(sent)} requests in {sent[-1].after_s:.0f} s, answers side by side")
        start_s = time.monotonic()
        asked = []
        async with asyncio.TaskGroup() as tasks:
            for each in sent:
                planned_s = start_s + each.after_s
                await asyncio.sleep(max(0.0, planned_s - time.monotonic()))
                question = self._ask(
                    self._prompt(each.prompt_tokens), each.output_tokens, planned_s
                )
                asked.append(tasks.create_task(question))
        return [task.result() for task in asked]

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

    async def _ask(
        self, prompt: tuple[int, ...], num_tokens: int, planned_s: float | None = None
    ) -> Answered:
        sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
        finished: Finished | None = None
        token_s: list[float] = []
        sent_s = time.monotonic() if planned_s is None else planned_s
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
