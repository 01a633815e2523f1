"""How long steps take while a worker serves: what corrects the times measured at its start.

    step ─▶ block of 8 to 32 steps ─▶ the last 16 blocks ─▶ `LiveSteps`
            median of measured / predicted    median over blocks

A median of medians: one long pause spoils a block, not the result, and a worker that is slower for
good is believed after half of the blocks. How sure it is follows from how well the median foretold
each next block: on a machine where others compute, too, a worker is slower for seconds and then is
not, and no number of steps within one of these seconds tells more. Steps with prompt tokens and
steps without are kept apart, since a worker may be wrong about one of them only.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape

MIN_BLOCK_STEPS, MAX_BLOCK_STEPS = 8, 32
MIN_BLOCK_S = 0.25
"""Of steps together: a hiccup of the machine lasts longer than many steps of a small model."""
MAX_NUM_BLOCKS = 16
FIRST_ERROR = 0.25
"""Relative, of the first block: nothing has been foretold yet. Counts as one error of many."""
LEAST_ERROR = 0.075
"""Smaller differences come and go whatever the last blocks say."""
MAX_NUM_ERRORS = 32
DEVIATION_OF_MEDIAN = 1.4826
"""From the median absolute value of normal errors to their standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Steps in a row."""

    num_steps: int
    shape: StepShape  # of all together
    ratio: float  # measured over predicted, typically


class StepKind:
    """Steps of one kind; bounded in memory, a few microseconds a step."""

    def __init__(self, coefficients: StepCoefficients) -> None:
        self._coefficients = coefficients
        self._blocks: deque[_Block] = deque(maxlen=MAX_NUM_BLOCKS)
        self._errors: deque[float] = deque(maxlen=MAX_NUM_ERRORS)  # of what was foretold
        self._ended_s = -math.inf
        self._start_block()

    def _start_block(self) -> None:
        self._ratios: list[float] = []
        self._block_s = 0.0
        self._shapes: list[StepShape] = []

    def note(self, shape: StepShape, elapsed_s: float, now_s: float) -> None:
        """Take one step that ended; one that is predicted to take no time says nothing."""
        predicted_s = self._coefficients.step_s(shape)
        if not (predicted_s > 0 and 0 < elapsed_s < math.inf):
            return
        self._ended_s = now_s
        self._ratios.append(elapsed_s / predicted_s)
        self._block_s += elapsed_s
        self._shapes.append(shape)
        num_steps = len(self._ratios)
        is_long = num_steps >= MIN_BLOCK_STEPS and self._block_s >= MIN_BLOCK_S
        if is_long or num_steps >= MAX_BLOCK_STEPS:
            self._end_block(num_steps)

    def _end_block(self, num_steps: int) -> None:
        shape = StepShape.total(self._shapes)
        ratio = median(self._ratios)
        if self._blocks:
            self._errors.append(abs(math.log(ratio / self._typical())))
        self._blocks.append(_Block(num_steps=num_steps, shape=shape, ratio=ratio))
        self._start_block()

    def _typical(self) -> float:
        return median(block.ratio for block in self._blocks)

    def _error(self) -> float:
        """A lasting change makes half a window of errors, which their median leaves out."""
        num = len(self._errors)
        deviation = DEVIATION_OF_MEDIAN * median(self._errors) if num else 0.0
        error = math.sqrt((FIRST_ERROR**2 + num * deviation**2) / (1 + num))
        return max(error, LEAST_ERROR)

    def summary(self, now_s: float) -> LiveSteps | None:
        """The last blocks together; None before the first is whole."""
        if not self._blocks:
            return None
        num_steps = sum(block.num_steps for block in self._blocks)
        shape = StepShape.total([block.shape for block in self._blocks])
        return LiveSteps(
            num_steps=num_steps,
            shape=shape,
            elapsed_s=self._typical() * self._coefficients.steps_s(num_steps, shape),
            relative_error=self._error(),
            age_s=max(now_s - self._ended_s, 0.0),
        )


class LiveStepTimes:
    """The steps of one worker, by kind."""

    def __init__(self, coefficients: StepCoefficients, clock: Callable[[], float]) -> None:
        """`coefficients` are those of the worker's hello: what is measured is held against them."""
        self.coefficients = coefficients
        self._clock = clock
        self._prefill = StepKind(coefficients)
        self._decode = StepKind(coefficients)

    def note(self, shape: StepShape, elapsed_s: float) -> None:
        """Take one step that has just ended."""
        kind = self._prefill if shape.num_prefill_tokens else self._decode
        kind.note(shape, elapsed_s, self._clock())

    def prefill_steps(self) -> LiveSteps | None:
        return self._prefill.summary(self._clock())

    def decode_steps(self) -> LiveSteps | None:
        return self._decode.summary(self._clock())
