"""Steps of a worker that serves: medians that pauses do not move and lasting changes do."""

import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape
from pdserve.engine.live_steps import MAX_BLOCK_STEPS, MAX_NUM_BLOCKS, LiveStepTimes

MEASURED = StepCoefficients(
    fixed_s=3e-3,
    prefill_token_s=3e-4,
    prefill_attention_s=4e-7,
    decode_token_s=4e-4,
    decode_context_token_s=1e-6,
)
SEEDS = range(30)


class Worker:
    """Takes decode steps of changing batches on a clock of its own."""

    def __init__(self, seed: int, measured: StepCoefficients = MEASURED) -> None:
        self.rng = Random(seed)
        self.now_s = 0.0
        self.times = LiveStepTimes(measured, lambda: self.now_s)

    def step(self, slowness: float, *, pause_s: float = 0.0, noise: float = 0.3) -> float:
        num = self.rng.randint(1, 30)
        shape = StepShape(num_decodes=num, num_decode_context_tokens=num * 100)
        busy = self.rng.lognormvariate(0.0, noise)
        elapsed_s = MEASURED.step_s(shape) * slowness * busy + pause_s
        self.now_s += elapsed_s
        self.times.note(shape, elapsed_s)
        return elapsed_s

    def slowness(self) -> float:
        steps = self.times.decode_steps()
        assert steps is not None
        found = steps.slowness(self.times.coefficients)
        assert found is not None
        return found


def test_steps_as_measured_give_one_and_an_error_that_shrinks_with_their_number() -> None:
    worker = Worker(0)
    errors = []
    for _ in range(1000):
        worker.step(1.0, noise=0.0)
        if (steps := worker.times.decode_steps()) is not None:
            assert steps.slowness(MEASURED) == pytest.approx(1.0, abs=1e-12)
            errors.append(steps.relative_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(0.25)
    assert errors[-1] == pytest.approx(0.075)
    assert worker.times.prefill_steps() is None


@pytest.mark.parametrize("seed", SEEDS)
def test_slowness_is_found_through_noise(seed: int) -> None:
    worker = Worker(seed)
    slowness = worker.rng.choice((0.4, 1.0, 2.7))
    for _ in range(200):
        worker.step(slowness)
    assert worker.slowness() == pytest.approx(slowness, rel=0.2), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_pauses_hardly_move_it(seed: int) -> None:
    """One of 300 ms; then a second in which every tenth step is hit."""
    worker = Worker(seed)
    for _ in range(200):
        worker.step(1.0, noise=0.1)
    before = worker.slowness()
    worker.step(1.0, pause_s=0.3, noise=0.1)
    for number in range(100):
        worker.step(1.0, pause_s=0.3 if number % 10 == 0 else 0.0, noise=0.1)
    assert worker.slowness() == pytest.approx(before, rel=0.15), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_all_steps_of_a_slow_moment_hardly_move_it(seed: int) -> None:
    """For 0.3 s everything takes four times as long."""
    worker = Worker(seed)
    for _ in range(300):
        worker.step(1.0, noise=0.1)
    slow_s = 0.0
    while slow_s < 0.3:
        slow_s += worker.step(4.0, noise=0.1)
    assert worker.slowness() == pytest.approx(1.0, rel=0.2), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_lasting_change_is_believed_within_some_hundred_steps(seed: int) -> None:
    worker = Worker(seed)
    for _ in range(1000):
        worker.step(1.0)
    for _ in range(200):
        worker.step(2.0)
    assert worker.slowness() == pytest.approx(2.0, rel=0.2), f"seed {seed}"


@pytest.mark.parametrize("seed", range(10))
def test_error_tells_how_far_it_may_be_off(seed: int) -> None:
    """Two standard errors hold the truth nearly always."""
    num_outside = 0
    for number in range(40):
        worker = Worker(1000 * seed + number)
        for _ in range(300):
            worker.step(1.0)
        steps = worker.times.decode_steps()
        assert steps is not None
        distance = abs(math.log(worker.slowness()))
        num_outside += distance > 2 * steps.relative_error
    assert num_outside <= 4, f"seed {seed}: {num_outside} of 40 outside"


def test_kinds_are_kept_apart() -> None:
    worker = Worker(0)
    prompt = StepShape(num_prefill_tokens=100, num_prefill_pairs=5050)
    for _ in range(60):
        worker.times.note(prompt, 3 * MEASURED.step_s(prompt))
        worker.step(1.0, noise=0.0)
    prefill = worker.times.prefill_steps()
    assert prefill is not None
    assert prefill.slowness(MEASURED) == pytest.approx(3.0)
    assert worker.slowness() == pytest.approx(1.0)
    assert prefill.shape.num_decodes == 0


def test_age_grows_while_no_steps_are_taken() -> None:
    worker = Worker(0)
    for _ in range(100):
        worker.step(1.0)
    worker.now_s += 42.0
    steps = worker.times.decode_steps()
    assert steps is not None
    assert steps.age_s == pytest.approx(42.0)


def test_memory_is_bounded() -> None:
    """However short the steps: the report never covers more than the last blocks."""
    worker = Worker(0)
    for _ in range(5 * MAX_NUM_BLOCKS * MAX_BLOCK_STEPS):
        worker.step(1e-6)
    steps = worker.times.decode_steps()
    assert steps is not None
    assert steps.num_steps == MAX_NUM_BLOCKS * MAX_BLOCK_STEPS


TIMES = st.sampled_from((0.0, 1e-12, 1e-3, 10.0))
ELAPSED = st.sampled_from((0.0, -1.0, 1e-300, 1e-9, 0.01, 1e6, math.inf, math.nan))
SHAPES = st.builds(
    StepShape,
    num_prefill_tokens=st.integers(0, 600),
    num_prefill_pairs=st.integers(0, 10**6),
    num_decodes=st.integers(0, 64),
    num_decode_context_tokens=st.integers(0, 10**5),
)


@given(
    measured=st.builds(
        StepCoefficients,
        fixed_s=TIMES,
        prefill_token_s=TIMES,
        prefill_attention_s=TIMES,
        decode_token_s=TIMES,
        decode_context_token_s=TIMES,
    ),
    steps=st.lists(st.tuples(SHAPES, ELAPSED), max_size=10),
)
def test_report_is_finite_and_positive_whatever_was_measured(
    measured: StepCoefficients, steps: list[tuple[StepShape, float]]
) -> None:
    times = LiveStepTimes(measured, lambda: 1.0)
    for shape, elapsed_s in steps * MAX_BLOCK_STEPS:
        times.note(shape, elapsed_s)
    reports: tuple[Callable[[], LiveSteps | None], ...] = (times.prefill_steps, times.decode_steps)
    for report in reports:
        found = report()
        if found is None:
            continue
        assert 0 < found.elapsed_s < math.inf
        assert 0 <= found.relative_error < math.inf
        slowness = found.slowness(measured)
        assert slowness is None or 0 < slowness < math.inf
