"""`python -m bench.ranks`: workers of two ranks on two cores beside a worker of one rank on one.

    1 rank      the engine alone
    tp 2        every layer on both ranks, with sums between them
    pp 2        half of the layers on each rank, one batch at a time

All take turns in every round, so that a noisy neighbour hits them alike; round 0 warms up and is
not counted. Prints medians of what a step takes, how much faster or slower that is than one rank,
and the share of the step that rank 0 spends in operations between ranks, waiting for the other
included. What `pp 2` spends there is the hand-over; while the second stage computes, the first
waits for its answer, which is no part of the share. Writes JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.engine.model import write_model
from bench.ranks.cases import CASES, NUM_BLOCKS
from pdserve.engine.hardware import processor_name

PLANS = {"1 rank": (1, 1), "tp 2": (2, 1), "pp 2": (1, 2)}
ALONE = "1 rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    plan: str
    case: str
    median_step_s: float
    one_rank_to_this: float  # above 1: faster than one rank
    communication_share: float
    rounds_s: tuple[float, ...]


class Contender:
    """A worker's engine in processes of its own."""

    def __init__(self, plan: str, model: Path, folder: Path, cores: Sequence[int]) -> None:
        tp, pp = PLANS[plan]
        settings = {
            "role": "decode",
            "worker_id": plan.replace(" ", ""),
            "cpus": list(cores[: tp * pp]),
            "engine": {"model": str(model), "tp": tp, "pp": pp, "num_blocks": NUM_BLOCKS},
        }
        path = folder / f"{plan}.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        self.plan = plan
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.ranks.contender", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def wait_until_ready(self) -> None:
        if not self._read().get("ready"):
            raise SystemExit(f"{self.plan} did not start")

    def run(self, case: str) -> Any:
        assert self._process.stdin is not None
        job = {"case": case, "num_steps": CASES[case]}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.plan} ended with code {self._process.wait()}")
        return json.loads(line)


def measure(contenders: Sequence[Contender], num_rounds: int) -> list[Measure]:
    """All contenders and cases in turn, in every round."""
    steps: dict[tuple[str, str], list[list[dict[str, float]]]] = {}
    for number in range(num_rounds + 1):
        for case in CASES:
            for each in contenders:
                taken = each.run(case)
                if number > 0:
                    steps.setdefault((each.plan, case), []).append(taken)
    return [_judged(plan, case, steps) for case in CASES for plan in PLANS]


def _judged(
    plan: str, case: str, steps: dict[tuple[str, str], list[list[dict[str, float]]]]
) -> Measure:
    rounds = steps[plan, case]
    taken = [step for each in rounds for step in each]
    median_s = statistics.median(step["step_s"] for step in taken)
    alone_s = statistics.median(step["step_s"] for each in steps[ALONE, case] for step in each)
    return Measure(
        plan=plan,
        case=case,
        median_step_s=median_s,
        one_rank_to_this=alone_s / median_s,
        communication_share=statistics.median(step["group_s"] / step["step_s"] for step in taken),
        rounds_s=tuple(statistics.median(step["step_s"] for step in each) for each in rounds),
    )


def show(measures: Sequence[Measure]) -> None:
    table = Table("step", "ranks", "ms", "against one rank", "between ranks")
    for each in measures:
        table.add_row(
            each.case,
            each.plan,
            f"{1e3 * each.median_step_s:.2f}",
            "" if each.plan == ALONE else f"{each.one_rank_to_this:.2f} x",
            "" if each.plan == ALONE else f"{each.communication_share:.0%}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cores", type=int, nargs=2, help="the first two of this process if left out"
    )
    parser.add_argument("--json", type=Path, default=Path("bench-ranks.json"))
    arguments = parser.parse_args()
    cores = arguments.cores or sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two ranks need two cores; this process has one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        contenders = [Contender(plan, folder / "model", folder, cores) for plan in PLANS]
        try:
            for each in contenders:
                each.wait_until_ready()
            measures = measure(contenders, arguments.rounds)
        finally:
            for each in contenders:
                each.close()
    show(measures)
    report = {
        "processor": processor_name(),
        "platform": platform.platform(),
        "load": os.getloadavg()[0],
        "measures": [asdict(each) for each in measures],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"load {report['load']:.0f} on {os.cpu_count()} cores; wrote {arguments.json}")


if __name__ == "__main__":
    main()
