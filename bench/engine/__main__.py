"""`python -m bench.engine`: one engine on one core, prefill, scheduling and sampling included.

    pdserve             our engine under a small first-come scheduler
    transformers        `generate_batch`, the library's own continuous batching
    vllm, vllm compiled vLLM on CPU, eager and with torch.compile, where it is installed

Each contender is a process of its own on the same core. All take turns in every round, so that a
noisy neighbour hits them alike; round 0 warms up and is not counted. Prints the machine's kind,
medians and ratios and writes JSON. CPU seconds are of the whole process, so threads that spin while
they wait count. `--isa avx2` keeps all contenders' libraries and compilers from AVX-512: an idea of
older cores on newer ones, not a measurement of them. In float16 and bfloat16 there is one more:

    pdserve gathered    our engine with KV gathered for each request and attended by torch
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.engine.model import VOCAB_SIZE, write_model
from bench.machine import AS_AVX2, Machine

REPOSITORY = Path(__file__).resolve().parents[2]
VLLM_VARIABLE = "PDSERVE_VLLM_PYTHON"
OURS = "pdserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every contender does in a round."""

    num_requests: int
    num_prompt_tokens: int
    num_new_tokens: int

    def prompts(self) -> list[list[int]]:
        chooser = random.Random(self.num_requests)
        return [
            [chooser.randrange(2, VOCAB_SIZE) for _ in range(self.num_prompt_tokens)]
            for _ in range(self.num_requests)
        ]


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

    def __init__(
        self, name: str, command: Sequence[str], core: int, variables: Mapping[str, str]
    ) -> None:
        self.name = name
        environment = {
            **os.environ,
            **variables,
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

    def run(self, prompts: list[list[int]], num_new_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        job = json.dumps({"prompts": prompts, "num_new_tokens": num_new_tokens})
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


def commands_of(model_dir: Path, vllm_python: str, dtype: str) -> dict[str, list[str]]:
    here = [sys.executable, "-m"]
    ours = [*here, "bench.engine.run_pdserve", str(model_dir), dtype]
    commands = {OURS: ours}
    if dtype != "float32":
        commands["pdserve gathered"] = [*ours, "torch"]
    commands["transformers"] = [*here, "bench.engine.run_transformers", str(model_dir), dtype]
    if vllm_python:
        vllm = [vllm_python, "-m", "bench.engine.run_vllm", str(model_dir), dtype]
        commands |= {"vllm": [*vllm, "--eager"], "vllm compiled": vllm}
    return commands


def start_contenders(
    commands: Mapping[str, Sequence[str]], core: int, variables: Mapping[str, str], out: Console
) -> list[Contender]:
    """Start them one after the other; say which are left out because they do not start."""
    contenders = []
    for name, command in commands.items():
        contender = Contender(name, command, core, variables)
        if contender.wait_until_ready():
            contenders.append(contender)
        else:
            contender.close()
            out.print(f"[yellow]{name} left out: it did not start")
    return contenders


def measure(contenders: list[Contender], work: Work, num_rounds: int) -> list[Measure]:
    prompts = work.prompts()
    answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contenders}
    for number in range(num_rounds + 1):
        for contender in contenders:
            answer = contender.run(prompts, work.num_new_tokens)
            if number:
                answers[contender.name].append(answer)
    return summarise(answers, work)


def summarise(answers: dict[str, list[dict[str, Any]]], work: Work) -> list[Measure]:
    num_tokens = work.num_requests * work.num_new_tokens
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
            num_requests=work.num_requests,
            median_tokens_per_s=rates[name][0],
            median_tokens_per_cpu_s=rates[name][1],
            rounds_s=tuple(answer["wall_s"] for answer in rounds),
            rounds_cpu_s=tuple(answer["cpu_s"] for answer in rounds),
            ours_to_this=rates[OURS][0] / rates[name][0],
            ours_to_this_cpu=rates[OURS][1] / rates[name][1],
            same_tokens=sum(
                mine == theirs for mine, theirs in zip(ours, rounds[0]["tokens"], strict=True)
            )
            / work.num_requests,
        )
        for name, rounds in answers.items()
    ]


def show(measures: list[Measure], title: str, out: Console) -> None:
    table = Table(title=title)
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine")
    parser.add_argument("--requests", type=int, nargs="+", default=[64])
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--isa", choices=("native", "avx2"), default="native")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=0, help="the core that all contenders share")
    parser.add_argument("--vllm-python", default=os.environ.get(VLLM_VARIABLE, ""))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out = Console()
    variables = AS_AVX2 if arguments.isa == "avx2" else {}
    if not arguments.vllm_python:
        out.print(
            f"[yellow]vllm left out: name its python with --vllm-python or {VLLM_VARIABLE} "
            "(sh bench/engine/install_vllm.sh DIRECTORY installs it)"
        )
    works = [
        Work(
            num_requests=num_requests,
            num_prompt_tokens=arguments.prompt_tokens,
            num_new_tokens=arguments.new_tokens,
        )
        for num_requests in arguments.requests
    ]
    machine = Machine.here(variables)
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as scratch:
        model_dir = Path(scratch)
        num_parameters = write_model(model_dir)
        commands = commands_of(model_dir, arguments.vllm_python, arguments.dtype)
        contenders = start_contenders(commands, arguments.core, variables, out)
        try:
            measures = [
                each for work in works for each in measure(contenders, work, arguments.rounds)
            ]
        finally:
            for contender in contenders:
                contender.close()
    title = (
        f"one core of {machine.text}: {arguments.dtype}, Llama 25 M, "
        f"{arguments.prompt_tokens}-token prompts, {arguments.new_tokens} new tokens, "
        f"medians of {arguments.rounds} rounds"
    )
    show(measures, title, out)
    if arguments.json:
        report = {
            "num_parameters": num_parameters,
            "machine": asdict(machine),
            "dtype": arguments.dtype,
            "works": [asdict(work) for work in works],
            "measures": [asdict(each) for each in measures],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
