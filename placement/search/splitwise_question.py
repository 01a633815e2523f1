"""Splitwise's question with its decode times read where they were measured.

Its simulator reads the time of a decode step of n requests at n batch *tokens*, below all that was
measured (MODEL.md, rule 1). Here a step costs

    f(B) + s * context tokens of the batch

with f from the batch sweep (prompts of 512 tokens) and s from the prompt sweep (batch 1); the file
has no point with both, so that the sum is an assumption. KV is sized by the model's true KV heads.
Queues and dispatch are those of our own router and workers.
"""

import csv
import gzip
import importlib.resources
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from placement.plan_inputs import PlanInputs
from placement.search.bounds import Bounds
from placement.search.choose import cheapest
from placement.search.designs import Worker
from placement.search.enumerate import MAX_BATCH
from placement.search.evaluate import Evaluator
from placement.search.judging import slowdown_judge
from placement.search.maximise import Contest
from placement.search.minimise import Bargain
from placement.search.problem import NOMINAL_CLASS, Problem, splitwise_profile
from placement.search.results import Rival, rival_of
from placement.search.space import Space
from placement.simulation.timing import SplitwiseTiming, StepTiming
from placement.simulation.trace import Floats, Ints
from placement.simulation.values import PdserveOptions, Rules, SimulationConfig

SWEEP_PROMPT = 512
STEP_TOKENS = 2048
TRUE_KV_HEAD_SHARE = {"llama2-70b": 8 / 64}
GPU_MEMORY_SHARE = 0.9
Row = tuple[int, int, int, float]  # prompt, batch, output, token ms


def corrected_plan(problem: Problem, evaluator: Evaluator) -> Rival | None:
    """The best design by the same objective with decode times as measured."""
    corrected = corrected_problem(problem)
    fresh = corrected_evaluator(corrected, evaluator)
    contest = Contest(
        corrected.space, fresh, corrected.value, tolerance=problem.inputs.search.tolerance
    )
    assert corrected.rate is not None
    bargain = Bargain(corrected.space, contest, corrected.price, corrected.rate)
    design = cheapest(corrected, bargain)
    if design is None:
        return None
    goal = problem.inputs.objective.goal
    why = f"{goal} {corrected.price(design):.5g}; published tables read at the wrong axis"
    return rival_of(design, "decode time read at the true batch and context", corrected.rate, why)


def corrected_evaluator(corrected: Problem, evaluator: Evaluator) -> Evaluator:
    """One that judges the corrected problem on the same horizon and seeds as `evaluator`."""
    return replace(evaluator, judge=corrected.judge, base=corrected.base, spare_workers=0)


def corrected_problem(problem: Problem) -> Problem:
    """The same machines, prices, requests and limits under our rules and measured decode times."""
    model = problem.inputs.latency.model if problem.inputs.latency else problem.inputs.model
    timings = {w.gpu: _timing(problem.inputs, model, w.gpu) for w in problem.space.workers}
    workers = tuple(_corrected(w, model, timings[w.gpu]) for w in problem.space.workers)
    reference = _timing(problem.inputs, model, "a100-80gb")
    profile = splitwise_profile(problem.inputs)
    published = profile.timing(model, hardware="a100-80gb", tp=8)
    sample = problem.traffic.sample()
    bounds = Bounds(
        workers,
        Rules.PDSERVE,
        (NOMINAL_CLASS,),
        sample,
        gap_cv=problem.traffic.gap_cv,
        max_step_tokens=STEP_TOKENS,
        max_batch=MAX_BATCH,
    )
    space = Space(
        fleets=problem.fleets,
        workers=workers,
        bounds={STEP_TOKENS: bounds},
        rules=Rules.PDSERVE,
        is_mixed_allowed=False,
    )
    return replace(
        problem,
        space=space,
        judge=slowdown_judge(published, _alone_token_s(reference)),
        base=SimulationConfig(pools=(), pdserve=PdserveOptions(max_step_tokens=STEP_TOKENS)),
    )


def _alone_token_s(timing: StepTiming) -> Callable[[Ints], Floats]:
    def token_s(prompts: Ints) -> Floats:
        alone: Floats = timing.decode_s[1] + timing.context_s[1] * prompts
        return alone

    return token_s


def _corrected(worker: Worker, model: str, timing: StepTiming) -> Worker:
    old = worker.pool.timing
    assert isinstance(old, SplitwiseTiming)
    kv_bytes = old.kv_bytes_per_token * TRUE_KV_HEAD_SHARE.get(model, 1.0)
    room = old.memory_bytes * GPU_MEMORY_SHARE - old.weight_bytes
    pool = replace(
        worker.pool,
        timing=timing,
        kv_bytes_per_token=kv_bytes,
        kv_tokens=int(room / kv_bytes),
    )
    return replace(worker, pool=pool, source="Splitwise's measurements, decode as measured")


def _timing(inputs: PlanInputs, model: str, gpu: str) -> StepTiming:
    profile = splitwise_profile(inputs)
    published = profile.timing(model, hardware=gpu, tp=8)
    rows = [row for key, row in _rows(inputs) if key == (model, gpu)]
    by_batch: dict[int, list[float]] = {}
    for prompt, batch, _, token_ms in rows:
        if prompt == SWEEP_PROMPT:
            by_batch.setdefault(batch, []).append(token_ms / 1e3)
    batches = np.array(sorted(by_batch), float)
    measured = np.array([np.median(by_batch[int(batch)]) for batch in batches])
    alone = np.array([(p + out / 2, ms / 1e3) for p, batch, out, ms in rows if batch == 1])
    slope = max(float(np.polyfit(alone[:, 0], alone[:, 1], 1)[0]), 0.0)
    outs = [out for p, batch, out, _ in rows if p == SWEEP_PROMPT and batch > 1]
    context = SWEEP_PROMPT + float(np.median(outs)) / 2
    sizes = np.arange(MAX_BATCH + 1, dtype=float)
    steps = np.interp(sizes, batches, measured)
    last = (measured[-1] - measured[-2]) / (batches[-1] - batches[-2])
    steps += np.maximum(sizes - batches[-1], 0.0) * last
    return StepTiming(
        prefill_tokens=published.tokens,
        prefill_s=published.prompt_s,
        pair_s=np.zeros(len(published.tokens)),
        decode_s=np.maximum(steps - slope * sizes * context, 1e-6),
        context_s=np.full(MAX_BATCH + 1, slope),
        shared_s=0.0,
        source="Splitwise's measurements, decode as measured",
    )


def _rows(inputs: PlanInputs) -> Iterator[tuple[tuple[str, str], Row]]:
    """Rows of the published file at TP 8, with prompt and batch apart."""
    packed = importlib.resources.files("placement") / "data" / "splitwise" / "perf_model.csv.gz"
    text = gzip.decompress(packed.read_bytes()).decode("utf-8-sig")
    for row in csv.DictReader(text.splitlines()):
        if int(row["tensor_parallel"]) != 8:
            continue
        key = (row["model"], row["hardware"])
        values = (int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"]))
        yield key, (*values, float(row["token_time"]))
