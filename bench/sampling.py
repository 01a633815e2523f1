"""`python -m bench.sampling`: drawing tokens for one step, on one core.

    pdserve        `pdserve.engine.sampling.draw_tokens`
    transformers   its temperature, top-k and top-p warpers, softmax and multinomial, in torch;
                   for log-probabilities torch's log_softmax and topk

Both draw for the same logits, in turn, in every round; round 0 warms up and is not counted. Prints
medians of the wall clock for all rows, and of the processor's time beside them: on a busy machine
the two differ.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pdserve.domain.sampling import SamplingParams
from pdserve.engine.contract import SampleStep
from pdserve.engine.ranking import Logits
from pdserve.engine.sampling import draw_tokens
from pdserve.engine.torch_engine import keep_freed_memory

Draw = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    logprobs: int | None = None


CASES = (
    Case(name="temperature"),
    Case(name="top_p 0.9", top_p=0.9),
    Case(name="top_p 0.999", top_p=0.999),
    Case(name="top_k 50", top_k=50),
    Case(name="top_k 50, top_p 0.9", top_k=50, top_p=0.9),
    Case(name="greedy, 20 logprobs", temperature=0.0, logprobs=20),
)


def logits_of(shape: str, num_rows: int, vocab_size: int) -> Logits:
    """peaked: 50 likely tokens; broad: half of the vocabulary counts; flat: all of it does."""
    rng = np.random.default_rng(0)
    spread = {"peaked": 2.0, "broad": 2.0, "flat": 1e-3}[shape]
    rows = rng.normal(0, spread, (num_rows, vocab_size))
    if shape == "peaked":
        rows[:, rng.permutation(vocab_size)[:50]] += 12
    result: Logits = rows.astype(np.float32)
    return result


def ours(logits: Logits, case: Case) -> Draw:
    steps = [
        SampleStep(
            params=SamplingParams(
                temperature=case.temperature,
                top_k=case.top_k,
                top_p=case.top_p,
                logprobs=case.logprobs,
                seed=row,
            ),
            token_index=1,
        )
        for row in range(len(logits))
    ]
    return lambda: draw_tokens(logits, steps, ())


def peers(logits: Logits, case: Case) -> Draw:
    from transformers.generation import logits_process

    library: Any = logits_process
    rows = torch.from_numpy(logits)
    if case.logprobs is not None:
        count = case.logprobs
        return lambda: (torch.log_softmax(rows, dim=-1).topk(count), rows.argmax(dim=-1))
    warpers = [library.TemperatureLogitsWarper(case.temperature)]
    if case.top_k:
        warpers.append(library.TopKLogitsWarper(case.top_k))
    if case.top_p < 1:
        warpers.append(library.TopPLogitsWarper(case.top_p))

    def draw() -> torch.Tensor:
        scores = rows
        for warp in warpers:
            scores = warp(None, scores)
        return torch.multinomial(torch.softmax(scores, dim=-1), 1)

    return draw


def medians(contenders: list[Draw], num_rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of the wall clock and of the processor for each contender."""
    seen: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for number in range(num_rounds + 1):
        for draw, times in zip(contenders, seen, strict=True):
            began, began_cpu = time.perf_counter(), time.process_time()
            draw()
            if number:
                elapsed = time.perf_counter() - began, time.process_time() - began_cpu
                times.append(elapsed)
    return [
        (
            statistics.median(wall for wall, _ in times) * 1e3,
            statistics.median(cpu for _, cpu in times) * 1e3,
        )
        for times in seen
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32, help="requests in the step [32]")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens [151936]")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count [15]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    table = Table(title=f"{options.rows} rows of {options.vocabulary:,} logits, ms (CPU ms)")
    for name in ("logits", "sampling", "pdserve", "transformers", "pdserve is"):
        table.add_column(name, justify="left" if name in ("logits", "sampling") else "right")
    for shape in ("peaked", "broad", "flat"):
        logits = logits_of(shape, options.rows, options.vocabulary)
        for case in CASES:
            contenders = [ours(logits, case), peers(logits, case)]
            (own, own_cpu), (peer, peer_cpu) = medians(contenders, options.rounds)
            cells = [f"{own:.1f} ({own_cpu:.1f})", f"{peer:.1f} ({peer_cpu:.1f})"]
            table.add_row(shape, case.name, *cells, f"{peer / own:.1f} x")
    Console().print(table)


if __name__ == "__main__":
    main()
