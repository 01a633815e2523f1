"""The simulator's front: one configuration on one workload, or many traces through one cluster.

    result = simulate(config, workload)
    summary = summarise(config, result, workload.output_tokens)

A search holds one `Simulator` for each candidate, which turns pools into arrays once, and one
workload with unit gaps, whose `trace(rate)` serves all rates and all candidates alike (common
random numbers).
"""

from collections.abc import Sequence

import numpy as np

from placement.demand import Workload
from placement.simulation.distserve import DistserveCluster
from placement.simulation.pdserve_rules import PdserveCluster
from placement.simulation.splitwise import SplitwiseCluster
from placement.simulation.summary import Summary, summarise
from placement.simulation.trace import Floats, Ints, Times, Trace
from placement.simulation.values import Rules, SimulationConfig, SimulationResult, TrafficClass

__all__ = ["Simulator", "Summary", "assign_classes", "attained", "simulate", "summarise"]

CLASS_SEED = 0x5105


class Simulator:
    """A cluster under its rules, ready for any number of traces.

    Raises `LocalFault` for pools that the rules do not know, and `run` for a request that no
    instance could ever hold.
    """

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self._cluster: DistserveCluster | SplitwiseCluster | PdserveCluster
        if config.rules is Rules.DISTSERVE:
            self._cluster = DistserveCluster(config.pools)
        elif config.rules is Rules.SPLITWISE:
            self._cluster = SplitwiseCluster(config.pools, config.splitwise)
        else:
            self._cluster = PdserveCluster(config.pools, config.pdserve)

    def run(self, trace: Trace, *, ttft_s: Floats | None = None) -> Times:
        """Simulate to the last request's end; the same input gives the same times.

        `ttft_s` is each request's promise, which only rules pdserve with prefill order deadline
        read.
        """
        if isinstance(self._cluster, PdserveCluster):
            return self._cluster.run(trace, ttft_s=ttft_s, concurrency=self.config.concurrency)
        return self._cluster.run(trace)


def simulate(config: SimulationConfig, workload: Workload) -> SimulationResult:
    """Simulate one configuration on one workload; see `SimulationConfig` for arrivals."""
    trace = workload.trace(config.rate, is_closed=config.concurrency is not None)
    class_index = workload.class_index
    if class_index is None:
        class_index = assign_classes(len(trace), config.slo)
    times = Simulator(config).run(trace, ttft_s=config.promises_s[class_index])
    return SimulationResult.of(times, class_index)


def attained(times: Times, slo: TrafficClass) -> float:
    """Share of requests that met both promises of a class."""
    met = (times.ttft_s <= slo.ttft_s) & (times.tpot_s <= slo.tpot_s)
    return float(np.mean(met)) if len(met) else 0.0


def assign_classes(num: int, slo: Sequence[TrafficClass]) -> Ints:
    """A class for each request by the classes' shares; the same numbers each time."""
    if len(slo) < 2:
        return np.zeros(num, np.int64)
    shares = np.cumsum([item.share for item in slo])
    drawn = np.random.default_rng(CLASS_SEED).random(num) * shares[-1]
    classes: Ints = np.searchsorted(shares, drawn, side="right").astype(np.int64)
    return classes
