"""The requests that candidates are judged on: the same ones for all of them.

A seed stands for one endless stream of unit gaps and lengths. A trace is its beginning, scaled to
the rate, so that candidates, rates and horizons share their random numbers.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pdserve.domain.errors import LocalFault
from placement.demand import ArrivalProcess, Workload, WorkloadSpec
from placement.plan_inputs import WorkloadInputs
from placement.simulation.trace import Floats, Ints, Trace
from placement.simulation.values import TrafficClass

MIN_REQUESTS = 100
MAX_REQUESTS = 3_000_000
FIRST_LENGTH = 4096
SAMPLE_LENGTH = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The beginning of one seed's requests."""

    workload: Workload  # with unit gaps
    class_index: Ints


class Traffic:
    """Traces by seed, rate and horizon; `length_scale` stretches prompts (a sensitivity)."""

    def __init__(
        self,
        inputs: WorkloadInputs,
        slo: tuple[TrafficClass, ...],
        *,
        seed: int = 0,
        length_scale: float = 1.0,
    ) -> None:
        self._inputs = inputs
        self._slo = slo
        self._seed = seed
        self._length_scale = length_scale
        self._streams: dict[int, Stream] = {}
        self._recorded: Workload | None = None
        if inputs.trace is not None:
            from placement.workload_files import read_workload

            self._recorded = read_workload(Path(inputs.trace))
            if len(self._recorded) == 0:
                raise LocalFault(f"{inputs.trace}: holds no requests")
            if inputs.max_context_tokens is not None:
                self._recorded = self._recorded.fitted(inputs.max_context_tokens)

    def changed(
        self,
        *,
        cv: float | None = None,
        length_scale: float = 1.0,
        prompt_cv: float | None = None,
    ) -> "Traffic":
        """The same requests with other burstiness or lengths."""
        inputs = self._inputs.changed(cv=cv, prompt_cv=prompt_cv)
        scale = self._length_scale * length_scale
        return Traffic(inputs, self._slo, seed=self._seed, length_scale=scale)

    def sample(self) -> tuple[Ints, Ints]:
        """Prompt and output lengths to compute bounds from."""
        if self._recorded is not None and len(self._recorded) <= SAMPLE_LENGTH:
            prompts = _scaled(self._recorded.prompt_tokens, self._length_scale)
            return prompts, self._recorded.output_tokens
        workload = self._stream(0, SAMPLE_LENGTH).workload
        return workload.prompt_tokens[:SAMPLE_LENGTH], workload.output_tokens[:SAMPLE_LENGTH]

    @property
    def gap_cv(self) -> float:
        """Burstiness of the arrivals."""
        if self._inputs.arrivals == "recorded":
            gaps = self._stream(0, FIRST_LENGTH).workload.gaps()
            return float(np.std(gaps) / max(float(np.mean(gaps)), 1e-12))
        return self._inputs.cv

    def longest(self) -> tuple[int, int]:
        """The longest prompt, and prompt with answer, among the first requests of any seed."""
        workload = self._recorded or self._stream(0, FIRST_LENGTH).workload
        prompts = _scaled(workload.prompt_tokens, self._length_scale if self._recorded else 1.0)
        return int(prompts.max()), int((prompts + workload.output_tokens).max())

    def trace(self, seed: int, rate: float, horizon_s: float) -> tuple[Trace, Ints]:
        """Requests of about `horizon_s` at `rate`, and their classes."""
        num = max(MIN_REQUESTS, round(rate * horizon_s))
        if num > MAX_REQUESTS:
            raise LocalFault(
                f"{rate:.4g} requests/s for {horizon_s:g} s are {num} requests, more than the "
                f"{MAX_REQUESTS} of one simulation: lower search.duration_s"
            )
        stream = self._stream(seed, num)
        return stream.workload.head(num).trace(rate), stream.class_index[:num]

    def _stream(self, seed: int, num: int) -> Stream:
        stream = self._streams.get(seed)
        if stream is None or len(stream.workload) < num:
            length = FIRST_LENGTH
            while length < num:
                length *= 2
            stream = self._draw(seed, length)
            self._streams[seed] = stream
        return stream

    def _draw(self, seed: int, num: int) -> Stream:
        children = np.random.SeedSequence([self._seed, seed]).spawn(3)
        lengths, gaps, classes = (np.random.default_rng(child) for child in children)
        unit_gaps = ArrivalProcess(cv=self._inputs.cv).unit_gaps(num, gaps)
        if self._recorded is None:
            workload = self._drawn(seed, num, unit_gaps)
        else:
            workload = self._resampled(num, unit_gaps, lengths)
        prompts = _scaled(workload.prompt_tokens, self._length_scale)
        index = workload.class_index
        if index is None:
            shares = np.cumsum([item.share for item in self._slo] or [1.0])
            drawn = classes.random(num) * shares[-1]
            index = np.searchsorted(shares, drawn, side="right").astype(np.int64)
        return Stream(workload=replace(workload, prompt_tokens=prompts), class_index=index)

    def _drawn(self, seed: int, num: int, unit_gaps: Floats) -> Workload:
        inputs = self._inputs
        assert inputs.prompt_tokens is not None
        assert inputs.output_tokens is not None
        spec = WorkloadSpec(
            num_requests=num,
            prompt_tokens=inputs.prompt_tokens,
            output_tokens=inputs.output_tokens,
            prefix=inputs.prefix,
        )
        return replace(spec.generate(self._seed * 1000 + seed), unit_gaps=unit_gaps, arrival_s=None)

    def _resampled(self, num: int, unit_gaps: Floats, rng: np.random.Generator) -> Workload:
        """Rows drawn with replacement; in their order where order means something."""
        recorded = self._recorded
        assert recorded is not None
        size = len(recorded)
        is_recorded = self._inputs.arrivals == "recorded"
        if is_recorded or recorded.prefix_ids is not None:
            rows = (int(rng.integers(0, size)) + np.arange(num)) % size
        else:
            rows = rng.integers(0, size, num)
        if is_recorded:
            unit_gaps = recorded.gaps()[rows].copy()
            unit_gaps[0] = 0.0
        starts, ids = _prefixes_of(recorded, rows)
        index = recorded.class_index
        return Workload(
            prompt_tokens=recorded.prompt_tokens[rows],
            output_tokens=recorded.output_tokens[rows],
            unit_gaps=unit_gaps,
            prefix_starts=starts,
            prefix_ids=ids,
            prefix_block_tokens=recorded.prefix_block_tokens,
            class_index=None if index is None else index[rows],
        )


def _scaled(lengths: Ints, scale: float) -> Ints:
    if scale == 1.0:
        return lengths
    scaled: Ints = np.maximum(np.rint(lengths * scale), 1).astype(np.int64)
    return scaled


def _prefixes_of(recorded: Workload, rows: Ints) -> tuple[Ints | None, Ints | None]:
    if recorded.prefix_ids is None or recorded.prefix_starts is None:
        return None, None
    starts, ids = recorded.prefix_starts, recorded.prefix_ids
    counts = (starts[1:] - starts[:-1])[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    return offsets, ids[np.repeat(starts[:-1][rows], counts) + within]
