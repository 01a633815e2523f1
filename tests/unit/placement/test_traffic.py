"""What is found out from the answers of a cluster that serves."""

from collections.abc import Sequence
from random import Random

import pytest

from pdserve.domain.latency import StepCoefficients
from pdserve.domain.tokens import Finished, FinishReason, PhaseTimeline, Usage
from placement.answered import Answered
from placement.fitted_profile import Handoff, Serving
from placement.traffic import Level, Steps, draw_traffic, fit_serving

STEPS = Steps(
    prefill=StepCoefficients(
        fixed_s=2e-3,
        prefill_token_s=5e-5,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    ),
    decode=StepCoefficients(
        fixed_s=2e-3,
        prefill_token_s=0.0,
        prefill_attention_s=0.0,
        decode_token_s=5e-5,
        decode_context_token_s=2e-7,
    ),
    max_step_tokens=512,
    num_prefill=1,
    num_decode=1,
    link_token_s=0.0,
)
TRUE = Serving(
    prefill=1.2,
    decode=1.3,
    beside_prefill=1.5,
    beside_answer=0.1,
    beside_decode=1.25,
    stolen_s=4e-3,
    wake_s=1e-3,
)
HANDOFF = Handoff(handoff_s=0.006, link_latency_s=0.0, link_bytes_per_s=1e15)
LATE_S = 0.003  # KV after the first token
NUM = 200


def serve(true: Serving, seed: int = 0) -> list[Answered]:
    """Answers of one prefill and one decode worker that take exactly what `true` says.

    Times depend on each other's overlaps, so they are computed over and over until they stand.
    """
    rng = Random(seed)
    prompts = [rng.randrange(64, 512) for _ in range(NUM)]
    steps = [rng.randrange(3, 60) for _ in range(NUM)]
    sent: list[float] = []
    for number in range(NUM):  # two levels of load
        gap_s = 0.2 if number < NUM // 2 else 0.06
        sent.append((sent[-1] if sent else 0.0) + gap_s * rng.expovariate(1.0))
    spans = [(at, at) for at in sent]
    reads = [(at, at) for at in sent]
    waits = [0.0] * NUM
    for _ in range(30):
        free_s = 0.0
        for i, at in enumerate(sent):
            start = max(at + HANDOFF.handoff_s / 2, free_s)
            lone_s = STEPS.read_s(prompts[i])
            end = start + (reads[i][1] - reads[i][0])
            beside_it = [spans[j] for j in range(NUM) if j != i]
            share = covered(start, end, beside_it)
            more = sum(covered(start, end, [other]) for other in beside_it) - share
            slower = 1 + share * (true.beside_prefill - 1) + more * true.beside_answer
            end = start + lone_s * true.prefill * slower
            reads[i], waits[i], free_s = (start, end), start - at - HANDOFF.handoff_s / 2, end
        for i, n in enumerate(steps):
            first, last = reads[i][1], reads[i][1] + (spans[i][1] - spans[i][0])
            inside = [(max(a, first), min(b, last), j) for j, (a, b) in enumerate(spans) if j != i]
            inside = [(a, b, j) for a, b, j in inside if b > a]
            whole = max(last - first, 1e-9)
            others = sum(b - a for a, b, _ in inside) / whole
            context = prompts[i] + n / 2
            context += sum((b - a) * (prompts[j] + steps[j] / 2) for a, b, j in inside) / whole
            base_s = 2e-3 + 5e-5 * (1 + others) + 2e-7 * context
            is_busy = any(a < first < b for j, (a, b) in enumerate(spans) if j != i)
            came = sum(first < at < last for at in sent)
            landed = sum(first < a < last for j, (a, _) in enumerate(spans) if j != i)
            beside = covered(first, last, reads)
            span_s = n * base_s * true.decode * (1 + beside * (true.beside_decode - 1))
            span_s += LATE_S
            span_s += true.stolen_s * (came + landed + is_busy) / 2
            span_s += 0.5 * base_s * true.decode if is_busy else true.wake_s
            spans[i] = (first, first + 0.5 * (span_s + spans[i][1] - spans[i][0]))
    return [answer(sent[i], reads[i], waits[i], spans[i], prompts[i], steps[i]) for i in range(NUM)]


def covered(first: float, last: float, spans: Sequence[tuple[float, float]]) -> float:
    """Share of a span that others cover."""
    total, reached = 0.0, first
    for a, b in sorted(spans):
        a, b = max(a, reached), min(b, last)
        if b > a:
            total, reached = total + b - a, b
    return total / (last - first) if last > first else 0.0


def answer(
    sent_s: float,
    read: tuple[float, float],
    wait_s: float,
    span: tuple[float, float],
    prompt_tokens: int,
    num_steps: int,
) -> Answered:
    back_s = HANDOFF.handoff_s / 2
    gap_s = (span[1] - span[0]) / num_steps
    timeline = PhaseTimeline(
        prefill_queue_s=wait_s,
        prefill_s=read[1] - read[0],
        prefill_worker="prefill-0",
        decode_worker="decode-0",
    )
    usage = Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=num_steps + 1,
        cached_prompt_tokens=0,
        seed=0,
    )
    return Answered(
        prompt_tokens=prompt_tokens,
        sent_s=sent_s,
        token_s=tuple(span[0] + back_s + gap_s * step for step in range(num_steps + 1)),
        finished=Finished(reason=FinishReason.LENGTH, usage=usage, timeline=timeline),
    )


def test_what_requests_cost_each_other_is_found() -> None:
    serving, handoff = fit_serving(serve(TRUE), STEPS, HANDOFF)
    for name in ("prefill", "decode", "beside_prefill", "beside_decode"):
        assert getattr(serving, name) == pytest.approx(getattr(TRUE, name), rel=0.05), name
    assert serving.beside_answer == pytest.approx(TRUE.beside_answer, abs=0.03)
    assert serving.stolen_s == pytest.approx(TRUE.stolen_s, rel=0.15)
    assert serving.wake_s == pytest.approx(TRUE.wake_s, abs=4e-4)
    assert handoff.handoff_s == pytest.approx(HANDOFF.handoff_s, rel=0.05)
    assert handoff.link_latency_s == pytest.approx(HANDOFF.handoff_s + LATE_S, rel=0.1)


def test_workers_that_do_not_disturb_each_other_are_seen_so() -> None:
    serving, _ = fit_serving(serve(Serving()), STEPS, HANDOFF)
    assert serving.prefill == pytest.approx(1.0, abs=0.02)
    assert serving.beside_prefill == pytest.approx(1.0, abs=0.03)
    assert serving.beside_decode == pytest.approx(1.0, abs=0.03)
    assert serving.stolen_s < 3e-4


def test_few_answers_say_nothing() -> None:
    assert fit_serving(serve(TRUE)[:20], STEPS, HANDOFF) == (Serving(), HANDOFF)


def test_traffic_fits_the_model_and_the_level() -> None:
    level = Level(0.3, 4, 64)
    sent = draw_traffic(level, STEPS, max_context_tokens=1024, max_batch=16, seed=1)
    assert sent == draw_traffic(level, STEPS, max_context_tokens=1024, max_batch=16, seed=1)
    assert all(96 <= each.prompt_tokens <= 512 for each in sent)
    assert all(4 <= each.output_tokens <= 64 for each in sent)
    busy_s = sum(STEPS.read_s(each.prompt_tokens) for each in sent)
    assert busy_s / sent[-1].after_s == pytest.approx(0.3, rel=0.2)
    short = draw_traffic(level, STEPS, max_context_tokens=128, max_batch=2, seed=1)
    assert all(each.prompt_tokens + each.output_tokens <= 128 for each in short)
