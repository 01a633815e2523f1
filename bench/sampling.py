"""`python -m bench.sampling`: drawing tokens for one step, on one core.

    pdserve        `pdserve.engine.sampling.draw_tokens`
    transformers   its temperature, top-k and top-p warpers, softmax and multinomial, in torch;
                   for log-probabilities torch's log_softmax and topk

Both draw for the same logits, in turn, in every round; round 0 warms up and is not counted. Prints
medians of the wall clock for all rows, of the processor's time beside them, as on a busy machine
the two differ, the ratio of the latter, and last the slowest case. Logits are "peaked" if 50 tokens
are likely and "broad" if half of the vocabulary counts; "bfloat16" and "float16" are broad ones,
rounded to these.
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
from pdserve.engine.gumbel import Floats
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
    *(Case(name=f"top_p {top_p}", top_p=top_p) for top_p in (0.5, 0.9, 0.99, 0.999, 0.9999)),
    *(Case(name=f"top_k {top_k:,}", top_k=top_k) for top_k in (1, 50, 1000, 100_000)),
    Case(name="top_k 50, top_p 0.9", top_k=50, top_p=0.9),
    Case(name="top_k 100,000, top_p 0.9", top_k=100_000, top_p=0.9),
    Case(name="greedy, 20 logprobs", temperature=0.0, logprobs=20),
)


def _peaked(rng: np.random.Generator, rows: int, size: int) -> Floats:
    logits = rng.normal(0, 2, (rows, size))
    logits[:, rng.permutation(size)[:50]] += 12
    return logits


def _plateau(rng: np.random.Generator, rows: int, size: int, num_high: int, gap: float) -> Floats:
    """`num_high` tokens lie `gap` above all others, which are nearly equal."""
    logits = rng.normal(0, 1e-3, (rows, size))
    logits[:, rng.permutation(size)[:num_high]] += gap
    return logits


SHAPES: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "peaked": _peaked,
    "broad": lambda rng, rows, size: rng.normal(0, 2, (rows, size)),
    "bfloat16": lambda rng, rows, size: _rounded(rng.normal(0, 2, (rows, size)), torch.bfloat16),
    "float16": lambda rng, rows, size: _rounded(rng.normal(0, 2, (rows, size)), torch.float16),
    "many ties": lambda rng, rows, size: rng.integers(0, 3, (rows, size)).astype(np.float64),
    "flat": lambda rng, rows, size: rng.normal(0, 1e-3, (rows, size)),
    "all equal": lambda rng, rows, size: np.full((rows, size), 1.5),
    "flat, 1 outlier": lambda rng, rows, size: _plateau(rng, rows, size, 1, 9.0),
    "flat, 100 above": lambda rng, rows, size: _plateau(rng, rows, size, 100, 6.0),
    "two clusters": lambda rng, rows, size: _plateau(rng, rows, size, size // 2, 8.0),
    "half ruled out": lambda rng, rows, size: np.where(
        rng.random((rows, size)) < 0.5, -np.inf, rng.normal(0, 2, (rows, size))
    ),
}


def _rounded(logits: Floats, dtype: torch.dtype) -> Floats:
    result: Floats = torch.from_numpy(logits).to(dtype).double().numpy()
    return result


def logits_of(shape: str, num_rows: int, vocab_size: int) -> Logits:
    return SHAPES[shape](np.random.default_rng(0), num_rows, vocab_size).astype(np.float32)


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
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count [5]")
    parser.add_argument("--logits", choices=SHAPES, action="append", help="only these [all]")
    parser.add_argument("--alone", action="store_true", help="measure pdserve only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    table = Table(title=f"{options.rows} rows of {options.vocabulary:,} logits, ms (CPU ms)")
    for name in ("logits", "sampling", "pdserve", "transformers", "pdserve is"):
        table.add_column(name, justify="left" if name in ("logits", "sampling") else "right")
    seen: list[tuple[float, str]] = []
    for shape in options.logits or SHAPES:
        logits = logits_of(shape, options.rows, options.vocabulary)
        for case in CASES:
            contenders = [ours(logits, case)]
            if not options.alone:
                contenders.append(peers(logits, case))
            (own, own_cpu), *others = medians(contenders, options.rounds)
            seen.append((own_cpu, f"{shape}, {case.name}"))
            cells = [f"{own:.1f} ({own_cpu:.1f})"]
            for peer, peer_cpu in others:
                cells += [f"{peer:.1f} ({peer_cpu:.1f})", f"{peer_cpu / own_cpu:.1f} x"]
            table.add_row(shape, case.name, *cells)
    console = Console()
    console.print(table)
    worst, name = max(seen)
    console.print(f"slowest case of pdserve: {name}: {worst:.1f} ms of the processor")


if __name__ == "__main__":
    main()
