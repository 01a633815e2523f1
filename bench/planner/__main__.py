"""Planning times, memory and answers, each question in a fresh process.

    python -m bench.planner [QUESTION ...] [--json out.json]

Questions are the files in `bench/planner/questions`. CPU seconds and peak memory are of the whole
process, start-up included; numba's kernels come from their cache unless it is empty.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).parent / "questions"


def ask(path: Path) -> dict[str, Any]:
    """Plan one question with the command itself."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "plan.json"
        command = [
            sys.executable,
            "-m",
            "pdserve.cli",
            "plan",
            str(path),
            "--json-file",
            str(answer),
        ]
        start_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        process.returncode = os.waitstatus_to_exitcode(status)
        result = json.loads(answer.read_text()) if answer.exists() else {}
    design = result.get("design") or {}
    return {
        "question": path.stem,
        "exit_code": process.returncode,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": wall_s,
        "peak_mb": usage.ru_maxrss / 1024,
        "plan": design.get("label"),
        "cells": result.get("num_cells"),
        "goodput": result.get("goodput"),
        "goodput_per_gpu": result.get("goodput", 0.0) / max(design.get("num_gpus", 0), 1),
        "interval": result.get("goodput_interval"),
        "usd_per_hour": (result.get("economy") or {}).get("usd_per_hour"),
        "disaggregation": result.get("disaggregation"),
        "num_runs": (result.get("stats") or {}).get("num_runs"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", help="names of questions [all]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = sorted(QUESTIONS.glob("*.yaml"))
    asked = [path for path in known if not options.questions or path.stem in options.questions]
    rows = []
    for path in asked:
        row = ask(path)
        rows.append(row)
        print(
            f"{row['question']:26} {row['cpu_s']:6.1f} CPU s {row['wall_s']:6.1f} s "
            f"{row['peak_mb']:4.0f} MB  {row['cells']} x {row['plan']}  "
            f"{row['goodput_per_gpu']:.3f} requests/s per GPU; {row['disaggregation']}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
