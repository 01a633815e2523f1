"""`python -m bench.engine`: one engine on one core, prefill, scheduling and sampling included.

    pdserve             our engine under a small first-come scheduler
    transformers        `generate_batch`, the library's own continuous batching
    vllm, vllm compiled vLLM on CPU, eager and with torch.compile, where it is installed

Each contender is a process of its own on the same core. All take turns in every round, so that a
noisy neighbour hits them alike; round 0 warms up and is not counted. Prints medians and ratios and
writes JSON. CPU seconds are of the whole process, so threads that spin while they wait count.
"""

import argparse
import json
import os
import platform
import random
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

from bench.engine.model import NUM_NEW_TOKENS, NUM_PROMPT_TOKENS, VOCAB_SIZE, write_model

REPOSITORY = Path(__file__).resolve().parents[2]
VLLM_VARIABLE = "PDSERVE_VLLM_PYTHON"
OURS = "pdserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    contender: str
    num_requests: int
    median_tokens_per_s: float
    median_tokens_per_cpu_s: float
    rounds_s: tuple[float, ...]
    rounds_cpu_s: tuple[float, ...]
    ours_to_this: float  # ratio of the median rates
    ours_to_this_cpu: float
    same_tokens: float  # share of requests with the same tokens as ours


class Contender:
    """One runner process; answers a job at a time."""

    def __init__(self, name: str, command: Sequence[str], core: int) -> None:
        self.name = name
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
        }
        self._process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )

    def wait_until_ready(self) -> bool:
        """False if the process ended instead."""
        return bool(self._read().get("ready"))

    def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        assert self._process.stdin is not None
        job = json.dumps({"prompts": prompts, "num_new_tokens": NUM_NEW_TOKENS})
        self._process.stdin.write(job + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if not answer:
            raise RuntimeError(f"{self.name} ended during a round")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        return answer


def start_contenders(model_dir: Path, vllm_python: str, core: int, out: Console) -> list[Contender]:
    """Start those that are installed, one after the other; say which are left out and why."""
    here = [sys.executable, "-m"]
    commands = {
        OURS: [*here, "bench.engine.run_pdserve", str(model_dir)],
        "transformers": [*here, "bench.engine.run_transformers", str(model_dir)],
    }
    if vllm_python:
        vllm = [vllm_python, "-m", "bench.engine.run_vllm", str(model_dir)]
        commands |= {"vllm": [*vllm, "--eager"], "vllm compiled": vllm}
    else:
        out.print(
            f"[yellow]vllm left out: name its python with --vllm-python or {VLLM_VARIABLE} "
            "(sh bench/engine/install_vllm.sh DIRECTORY installs it)"
        )
    contenders = []
    for name, command in commands.items():
        contender = Contender(name, command, core)
        if contender.wait_until_ready():
            contenders.append(contender)
        else:
            contender.close()
            out.print(f"[yellow]{name} left out: it did not start")
    return contenders


def measure(contenders: list[Contender], num_requests: int, num_rounds: int) -> list[Measure]:
    chooser = random.Random(num_requests)
    prompts = [
        [chooser.randrange(2, VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)]
        for _ in range(num_requests)
    ]
    answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contenders}
    for number in range(num_rounds + 1):
        for contender in contenders:
            answer = contender.run(prompts)
            if number:
                answers[contender.name].append(answer)
    return summarise(answers, num_requests)


def summarise(answers: dict[str, list[dict[str, Any]]], num_requests: int) -> list[Measure]:
    num_tokens = num_requests * NUM_NEW_TOKENS
    rates = {
        name: tuple(
            num_tokens / statistics.median(answer[key] for answer in rounds)
            for key in ("wall_s", "cpu_s")
        )
        for name, rounds in answers.items()
    }
    ours = answers[OURS][0]["tokens"]
    return [
        Measure(
            contender=name,
            num_requests=num_requests,
            median_tokens_per_s=rates[name][0],
            median_tokens_per_cpu_s=rates[name][1],
            rounds_s=tuple(answer["wall_s"] for answer in rounds),
            rounds_cpu_s=tuple(answer["cpu_s"] for answer in rounds),
            ours_to_this=rates[OURS][0] / rates[name][0],
            ours_to_this_cpu=rates[OURS][1] / rates[name][1],
            same_tokens=sum(
                mine == theirs for mine, theirs in zip(ours, rounds[0]["tokens"], strict=True)
            )
            / num_requests,
        )
        for name, rounds in answers.items()
    ]


def show(measures: list[Measure], out: Console) -> None:
    table = Table(title="one core, float32, Llama 25 M, 24-token prompts, 64 new tokens: medians")
    for column in ("requests", "engine", "tokens/s", "per CPU s", "pdserve is", "by CPU", "same"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for each in measures:
        table.add_row(
            str(each.num_requests),
            each.contender,
            f"{each.median_tokens_per_s:.0f}",
            f"{each.median_tokens_per_cpu_s:.0f}",
            f"{each.ours_to_this:.2f} x",
            f"{each.ours_to_this_cpu:.2f} x",
            f"{each.same_tokens:.0%}",
        )
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine")
    parser.add_argument("--requests", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=0, help="the core that all contenders share")
    parser.add_argument("--vllm-python", default=os.environ.get(VLLM_VARIABLE, ""))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    out = Console()
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as scratch:
        model_dir = Path(scratch)
        num_parameters = write_model(model_dir)
        contenders = start_contenders(model_dir, arguments.vllm_python, arguments.core, out)
        try:
            measures = [
                each
                for num_requests in arguments.requests
                for each in measure(contenders, num_requests, arguments.rounds)
            ]
        finally:
            for contender in contenders:
                contender.close()
    show(measures, out)
    if arguments.json:
        report = {
            "num_parameters": num_parameters,
            "machine": platform.processor() or platform.machine(),
            "load_1_min": os.getloadavg()[0],
            "measures": [asdict(each) for each in measures],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
