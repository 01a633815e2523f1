"""Compile all kernels into the cache: `python -m placement.simulation.warm`, once after installing.

Without it the first simulation under each set of rules takes some 10 s of CPU time longer.
"""

import time

import numpy as np

from placement.profiles import DistserveProfile, SplitwiseProfile, load_profile
from placement.simulate import Simulator
from placement.simulation.distserve import DistserveCluster
from placement.simulation.trace import Trace
from placement.simulation.values import Pool, PoolRole, Rules, SimulationConfig


def warm_up() -> None:
    """Run a few requests through every kernel."""
    fit = load_profile("profiler-a100-80g.distserve.json")
    measured = load_profile("perf_model.csv")
    assert isinstance(fit, DistserveProfile)
    assert isinstance(measured, SplitwiseProfile)
    small = fit.timing("facebook/opt-13b", tp=1)
    large = measured.timing("llama2-70b", hardware="h100")
    pair, alone = (PoolRole.PREFILL, PoolRole.DECODE), (PoolRole.COLOCATED,)
    trace = Trace(arrival_s=np.arange(4.0), prompts=np.full(4, 100), outputs=np.array([1, 3, 5, 7]))
    for roles in (pair, alone):
        pools = tuple(Pool(role=role, replicas=1, timing=small) for role in roles)
        DistserveCluster(pools).run(trace)
        DistserveCluster(pools).run(trace, is_explicit=True)
    pools = tuple(Pool(role=role, replicas=1, timing=small) for role in pair)
    Simulator(SimulationConfig(pools=pools)).run(trace)
    pools = tuple(Pool(role=role, replicas=1, timing=large, tp=8) for role in pair)
    Simulator(SimulationConfig(pools=pools, rules=Rules.SPLITWISE)).run(trace)


if __name__ == "__main__":
    started_s = time.monotonic()
    warm_up()
    print(f"simulator kernels are ready ({time.monotonic() - started_s:.1f} s)")
