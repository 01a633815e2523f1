"""What can be known without simulation: floors, most that a worker can do, and good guesses.

    floor      no plan promises less than a prompt alone in a worker, a decode step of one request
    bound      a worker reads no more prompts, in the largest batches that still meet the promise,
               than fill its time; it decodes no more than its largest batch whose step is in time
    estimate   prefill as a queue with general service (Kingman's tail, Allen-Cunneen's wait),
               decode as the batch at which arrivals and departures balance, with room for spread

Floors and bounds prune. Estimates only set the order in which candidates are simulated, and drop
those that are far off.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pdserve.domain.errors import LocalFault
from placement.search.designs import Counts, Design, Worker
from placement.search.phase_times import PhaseTimes, phase_times
from placement.simulation.trace import Ints
from placement.simulation.values import PoolRole, Rules, TrafficClass

BOUND_SLACK = 1.2  # lengths differ from the sample, and a finite trace leaves work to its end
BATCH_SPREAD = 1.3  # standard deviations of the batch that an estimate leaves room for
QUEUE_SHARE = 0.6
LARGE_POOL = 8
PIPELINE_SHARE = 0.97  # of the estimate, for each stage more; of colocated workers much less
COLOCATED_PIPELINE_SHARE = 0.85
MIXED_STEP_SHARE = 0.85  # of the sum of both phases' work, what mixed steps can save at best


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least that any worker of the cluster reaches, and which one."""

    ttft_s: float  # at the attainment's quantile of the lengths
    ttft_worker: str
    tpot_s: float
    tpot_worker: str


class Bounds:
    """Floors, bounds and estimates of one problem; cheap, and cached by worker and count."""

    def __init__(
        self,
        workers: Iterable[Worker],
        rules: Rules,
        slo: tuple[TrafficClass, ...],
        sample: tuple[Ints, Ints],
        *,
        gap_cv: float,
        max_step_tokens: int,
        max_batch: int,
        handoff_s: float = 0.0,
    ) -> None:
        self.workers = tuple(workers)
        self.slo = slo
        self._sample = sample
        self._gap_cv = gap_cv
        self._handoff_s = handoff_s
        self._mean_output = max(float(sample[1].mean()), 1e-9)
        self._times: dict[Worker, PhaseTimes] = {}
        loosest = max((item.ttft_s for item in slo), default=math.inf)
        for worker in self.workers:
            if worker.with_role(PoolRole.COLOCATED) not in self._times:
                self._times[worker.with_role(PoolRole.COLOCATED)] = phase_times(
                    worker,
                    rules,
                    sample,
                    max_step_tokens=max_step_tokens,
                    max_batch=max_batch,
                    ttft_s=loosest,
                )
        self._prefill_cache: dict[tuple[Worker, int], float] = {}

    def times(self, worker: Worker) -> PhaseTimes:
        return self._times[worker.with_role(PoolRole.COLOCATED)]

    # Floors.

    def floor(self, slo: TrafficClass) -> Floor:
        """The least promise of a class that the best worker can keep, unloaded."""
        readers = [w for w in self.workers if w.role is not PoolRole.DECODE]
        writers = [w for w in self.workers if w.role is not PoolRole.PREFILL]
        ttft = [(self.ttft_floor(w, slo), w.label) for w in readers]
        tpot = [(self.times(w).floor_step_s, w.label) for w in writers]
        best_ttft, best_tpot = min(ttft), min(tpot)
        return Floor(
            ttft_s=best_ttft[0],
            ttft_worker=best_ttft[1],
            tpot_s=best_tpot[0],
            tpot_worker=best_tpot[1],
        )

    def ttft_floor(self, worker: Worker, slo: TrafficClass) -> float:
        """The attainment's quantile of one worker's unloaded time to the first token."""
        latency_s = self.times(worker).latency_s + self._handoff_s
        # The attainment's quantile, from below: only so many prompts may fail.
        return float(np.quantile(latency_s, slo.attainment, method="lower"))

    def check_floors(self) -> None:
        """Raise `LocalFault` where a promise is below what physics allow; says what sets it."""
        for item in self.slo:
            floor = self.floor(item)
            if item.ttft_s < floor.ttft_s:
                share = item.attainment
                raise LocalFault(
                    f"slo {item.name}: ttft_s {item.ttft_s:g} is below the floor "
                    f"{floor.ttft_s:.4g} s: the time of {floor.ttft_worker} to read, alone, the "
                    f"prompt that {share:.0%} of the requests do not exceed; "
                    "longer promises, faster GPUs or shorter prompts help"
                )
            if item.tpot_s < floor.tpot_s:
                raise LocalFault(
                    f"slo {item.name}: tpot_s {item.tpot_s:g} is below the floor "
                    f"{floor.tpot_s:.4g} s: one decode step of one request alone on "
                    f"{floor.tpot_worker}, set by reading the weights once a token; "
                    "longer promises, faster memory or more TP help"
                )

    def can_serve(self, worker: Worker) -> bool:
        """Whether a worker can meet each class's promise unloaded, in its role."""
        for item in self.slo:
            reads = worker.role is not PoolRole.DECODE
            if reads and self.ttft_floor(worker, item) > item.ttft_s:
                return False
            writes = worker.role is not PoolRole.PREFILL
            if writes and self.times(worker).floor_step_s > item.tpot_s:
                return False
        return True

    # Bounds.

    def prefill_bound(self, worker: Worker) -> float:
        """Requests/s that one worker can read at most."""
        return BOUND_SLACK / self.times(worker).saturated_s

    def decode_bound(self, worker: Worker) -> float:
        """Requests/s that one worker can decode at most with steps in time."""
        return BOUND_SLACK * self._decode_rate(worker, max(s.tpot_s for s in self.slo), 0.0)

    def rate_bound(self, design: Design) -> float:
        """Requests/s that no run of the design can keep promises at."""
        least = min(item.attainment for item in self.slo)
        read = sum(self.prefill_bound(w) * n for w, n in design.side(PoolRole.PREFILL))
        write = sum(self.decode_bound(w) * n for w, n in design.side(PoolRole.DECODE))
        both = 0.0
        for worker, count in design.side(PoolRole.COLOCATED):
            work = 1 / self.prefill_bound(worker) + 1 / self.decode_bound(worker)
            both += count / (work * MIXED_STEP_SHARE)
            read += count * self.prefill_bound(worker)
            write += count * self.decode_bound(worker)
        if design.kind == "colocated":
            return both / least
        return min(read, write) / least

    # Estimates.

    def estimate(self, design: Design) -> float:
        """Requests/s at which the design probably just keeps its promises."""
        prefill, decode = design.side(PoolRole.PREFILL), design.side(PoolRole.DECODE)
        both = design.side(PoolRole.COLOCATED)
        alone = sum(self._colocated_estimate(worker) * count for worker, count in both)
        if not prefill and not decode:
            return alone
        read, write = self.prefill_estimate(prefill), self.decode_estimate(decode)
        # What one side has too little of, colocated workers add at the price of the other phase.
        helped_read = read + sum(n * self._alone_prefill(w) for w, n in both)
        helped_write = write + sum(n * self._decode_estimate_of(w) for w, n in both)
        return min(helped_read, helped_write, min(read, write) + max(alone, 0.0) * 1.3)

    def _alone_prefill(self, worker: Worker) -> float:
        return self.prefill_estimate(((worker.with_role(PoolRole.PREFILL), 1),))

    def prefill_estimate(self, side: Counts) -> float:
        """Rate at which the tail of the wait just eats the slack of the promise."""
        return sum(self._pool_prefill(worker, count) for worker, count in side)

    def _pool_prefill(self, worker: Worker, count: int) -> float:
        key = (worker, count)
        if key not in self._prefill_cache:
            self._prefill_cache[key] = self._solve_prefill(worker, count)
        return self._prefill_cache[key]

    def _solve_prefill(self, worker: Worker, count: int) -> float:
        times = self.times(worker)
        mean = float(times.occupied_s.mean())
        capacity = count / mean
        spread = float(times.occupied_s.std()) / max(mean, 1e-12)
        variation = (self._gap_cv**2 + spread**2) / 2
        low, high = 0.0, 1.0
        for _ in range(18):
            load = (low + high) / 2
            if self._meets_ttft(times, load, count, mean, max(variation, 0.05)):
                low = load
            else:
                high = load
        return low * capacity * PIPELINE_SHARE ** (worker.pp - 1)

    def _meets_ttft(
        self, times: PhaseTimes, load: float, count: int, mean: float, variation: float
    ) -> bool:
        # Sakasegawa's exponent, less since requests queue at one worker and not for the first free.
        wait_share = load ** (QUEUE_SHARE * (math.sqrt(2 * (count + 1)) - 1))
        decay = count * (1 - load) / (mean * variation)
        for item in self.slo:
            slack = item.ttft_s - self._handoff_s - times.latency_s
            met = np.where(slack >= 0, 1 - wait_share * np.exp(-decay * np.maximum(slack, 0)), 0.0)
            if float(met.mean()) < item.attainment:
                return False
        return True

    def decode_estimate(self, side: Counts) -> float:
        return sum(self._decode_estimate_of(worker) * count for worker, count in side)

    def _decode_estimate_of(self, worker: Worker) -> float:
        rate = self._decode_rate(worker, min(s.tpot_s for s in self.slo), BATCH_SPREAD)
        return rate * PIPELINE_SHARE ** (worker.pp - 1)

    def _decode_rate(self, worker: Worker, tpot_s: float, spread: float) -> float:
        times = self.times(worker)
        in_time = times.step_s <= tpot_s
        if not in_time.any():
            return 0.0
        size = float(times.batches[in_time][-1])
        last = int(np.flatnonzero(in_time)[-1])
        if last + 1 < len(times.batches):  # between two knots
            step = times.step_s
            part = (tpot_s - step[last]) / (step[last + 1] - step[last])
            size += part * float(times.batches[last + 1] - times.batches[last])
        size = max(size - spread * math.sqrt(size), 1.0)
        step_s = float(np.interp(size, times.batches, times.step_s))
        return size / step_s / self._mean_output

    def _colocated_estimate(self, worker: Worker) -> float:
        read, write = self._alone_prefill(worker), self._decode_estimate_of(worker)
        if read <= 0 or write <= 0:
            return 0.0
        return COLOCATED_PIPELINE_SHARE ** (worker.pp - 1) / (1 / read + 1 / write)

    def largest_batch(self, worker: Worker) -> int:
        """Requests decoded at once whose step is still in time, with room for long contexts."""
        times = self.times(worker)
        tpot_s = max((item.tpot_s for item in self.slo), default=math.inf)
        in_time = times.step_s <= tpot_s
        return int(times.batches[in_time][-1]) if in_time.any() else 1

    def places(self, worker: Worker) -> int:
        """Requests that a worker takes on at once for its largest batch to fill.

        Ours give a place before the prompt is read, so that it is held for the time to the first
        token as well as for the answer.
        """
        batch = self.largest_batch(worker)
        tpot_s = max((item.tpot_s for item in self.slo), default=math.inf)
        ttft_s = max((item.ttft_s for item in self.slo), default=0.0)
        return math.ceil(batch * (1 + ttft_s / (self._mean_output * tpot_s)))

    def single_estimate(self, worker: Worker) -> float:
        """Requests/s of one worker in a large pool, in its role."""
        if worker.role is PoolRole.PREFILL:
            return self.prefill_estimate(((worker, LARGE_POOL),)) / LARGE_POOL
        if worker.role is PoolRole.DECODE:
            return self._decode_estimate_of(worker)
        return self._colocated_estimate(worker)
