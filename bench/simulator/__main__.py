"""Simulated requests per CPU second: our kernels and a plain Python event loop, same workload.

    python -m bench.simulator [--json FILE] [--num-requests N] [--num-peer-requests N]

ShareGPT-like lengths (300 requests of DistServe's artifact, drawn with replacement), Poisson
arrivals, DistServe's rules and A100 profile for OPT-13B. One core; start-up and compilation are
not counted, reading arrays in and out is. The times of both are compared request by request.
"""

import argparse
import csv
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from placement.demand import Workload
from placement.profiles import DistserveProfile, load_profile
from placement.simulate import Simulator
from placement.simulation.timing import DistserveTiming
from placement.simulation.trace import Times, Trace
from placement.simulation.values import Pool, PoolRole, Rules, SimulationConfig
from tests.support.event_loop import PeerRequest, run_event_loop

LENGTHS = Path(__file__).parent / "data" / "sharegpt.csv"
NUM_ROUNDS = 5
TARGET_PER_S = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case; requests per CPU second, the best of NUM_ROUNDS for ours."""

    case: str
    rate: float
    ours_per_s: float
    peer_per_s: float | None
    largest_difference_ms: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.peer_per_s is None else self.ours_per_s / self.peer_per_s


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.simulator", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("out/bench/simulator.json"))
    parser.add_argument("--num-requests", type=int, default=200_000)
    parser.add_argument("--num-peer-requests", type=int, default=3_000)
    options = parser.parse_args()
    workload = sharegpt_like(options.num_requests)
    rows = [
        measure(case, rate, config, workload, options.num_peer_requests)
        for case, rate, config in cases()
    ]
    show(rows)
    write(rows, options.json)


def cases() -> list[tuple[str, float, SimulationConfig]]:
    """Name, requests/s, cluster."""
    ours, colocated = Fit("distserve"), Fit("vllm")
    prefill, decode = PoolRole.PREFILL, PoolRole.DECODE
    pair = (Pool(role=prefill, replicas=1, timing=ours(2), tp=2), pool(decode, 1, ours(1)))
    many = (Pool(role=prefill, replicas=3, timing=ours(2), tp=2), pool(decode, 5, ours(1)))
    alone = (pool(PoolRole.COLOCATED, 1, colocated(1)),)
    return [
        ("distserve 1:1 (ShareGPT-like)", 4.0, config_of(pair, Rules.DISTSERVE)),
        ("distserve 3:5", 12.0, config_of(many, Rules.DISTSERVE)),
        ("distserve colocated", 1.5, config_of(alone, Rules.DISTSERVE)),
        ("pdserve 1:1", 4.0, config_of(pair, Rules.PDSERVE)),
        ("pdserve 3:5", 12.0, config_of(many, Rules.PDSERVE)),
    ]


def measure(
    case: str, rate: float, config: SimulationConfig, workload: Workload, num_peer: int
) -> Row:
    """Time ours on all requests, the peer on the first ones, and compare these."""
    simulator = Simulator(config)
    head = workload.head(num_peer).trace(rate)
    checked = simulator.run(head)  # compiles, too
    best_s = float("inf")
    for _ in range(NUM_ROUNDS):
        started_s = time.process_time()
        simulator.run(workload.trace(rate))
        best_s = min(best_s, time.process_time() - started_s)
    peer_per_s = difference_ms = None
    if config.rules is Rules.DISTSERVE:
        peer_per_s, difference_ms = measure_peer(config, head, checked)
    return Row(
        case=case,
        rate=rate,
        ours_per_s=len(workload) / best_s,
        peer_per_s=peer_per_s,
        largest_difference_ms=difference_ms,
    )


def measure_peer(config: SimulationConfig, trace: Trace, ours: Times) -> tuple[float, float]:
    """The event loop's requests per CPU second, and how far ours is from it at most."""
    requests = [
        PeerRequest(number, int(prompt), int(output), float(arrival * 1e3))
        for number, (prompt, output, arrival) in enumerate(
            zip(trace.prompts, trace.outputs, trace.arrival_s, strict=True)
        )
    ]
    started_s = time.process_time()
    run_event_loop(requests, instances(config, decode=False), instances(config, decode=True))
    took_s = time.process_time() - started_s
    ttft_ms = np.array([request.first_ms - request.arrival_ms for request in requests])
    e2e_ms = np.array([request.last_ms - request.arrival_ms for request in requests])
    difference = max(
        np.abs(ours.ttft_s * 1e3 - ttft_ms).max(), np.abs(ours.e2e_s * 1e3 - e2e_ms).max()
    )
    return len(requests) / took_s, float(difference)


def instances(config: SimulationConfig, *, decode: bool) -> list[tuple[DistserveTiming, int]]:
    found = []
    for item in config.pools:
        assert isinstance(item.timing, DistserveTiming)
        if (item.role is PoolRole.DECODE) == decode:
            found += [(item.timing, item.pp)] * item.replicas
    return found


def sharegpt_like(num: int) -> Workload:
    """`num` requests with the lengths of the file, Poisson, one seed."""
    rows = list(csv.DictReader(LENGTHS.read_text(encoding="utf-8").splitlines()))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(rows), num)
    return Workload(
        prompt_tokens=np.array([int(row["prompt_len"]) for row in rows])[drawn],
        output_tokens=np.array([int(row["output_len"]) for row in rows])[drawn],
        unit_gaps=rng.exponential(size=num),
    )


class Fit:
    """The timing of OPT-13B by tensor parallelism."""

    def __init__(self, engine: str) -> None:
        profile = load_profile(f"profiler-a100-80g.{engine}.json")
        assert isinstance(profile, DistserveProfile)
        self._profile = profile

    def __call__(self, tp: int) -> DistserveTiming:
        return self._profile.timing("facebook/opt-13b", tp=tp)


def pool(role: PoolRole, replicas: int, timing: DistserveTiming) -> Pool:
    return Pool(role=role, replicas=replicas, timing=timing)


def config_of(pools: tuple[Pool, ...], rules: Rules) -> SimulationConfig:
    return SimulationConfig(pools=pools, rules=rules)


def show(rows: list[Row]) -> None:
    table = Table(title="simulated requests per CPU second, one core", title_justify="left")
    for name in ("case", "rate", "ours", "Python event loop", "ratio", "largest difference, ms"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        peer = "-" if row.peer_per_s is None else f"{row.peer_per_s:,.0f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:,.0f} x"
        gap = row.largest_difference_ms
        difference = "-" if gap is None else f"{gap:.1e}"
        table.add_row(row.case, f"{row.rate:g}", f"{row.ours_per_s:,.0f}", peer, ratio, difference)
    console = Console()
    console.print(table)
    verdict = "met" if rows[0].ours_per_s >= TARGET_PER_S else "missed"
    console.print(f"target {TARGET_PER_S:,}/s on the ShareGPT-like case: {verdict}")


def write(rows: list[Row], path: Path) -> None:
    data = {
        "benchmark": "simulator",
        "unit": "simulated requests per CPU second",
        "target_per_s": TARGET_PER_S,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
