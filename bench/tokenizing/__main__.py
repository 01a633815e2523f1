"""`python -m bench.tokenizing`: what huge prompts cost the other requests of a router.

    thread          the library's `encode`, one text after another in a thread
    batch thread    the library's `encode_batch_fast` there, which releases the interpreter's lock
    processes       ours: long texts in processes of their own (`router.tokenizing`)

Each contender gets huge texts all at once and, while they are encoded, a short and a longer text
again and again. Prints how long the event loop stood still at the most, how late the short and the
longer text were at the worst, and how long the huge texts took. Writes JSON.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import tokenizers
import uvloop
from rich.console import Console
from rich.table import Table

from pdserve.engine.tokenizer import Tokenizer
from pdserve.models import DEMO_MODEL_DIR
from router.tokenizing import TextEncoder

SHORT = "def fibonacci(n):"
LONGER_CHARS = 20_000

Encode = Callable[[str], Awaitable[Sequence[int]]]
Contender = Callable[[Path], contextlib.AbstractAsyncContextManager[Encode]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    contender: str
    texts: str
    num_huge: int
    num_chars: int
    longest_stall_s: float
    short_median_s: float
    short_worst_s: float
    longer_worst_s: float
    huge_s: float  # until the last one was encoded


@contextlib.asynccontextmanager
async def thread(model_dir: Path) -> AsyncIterator[Encode]:
    inner = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    async with _in_thread(lambda text: tuple(inner.encode(text).ids)) as encode:
        yield encode


@contextlib.asynccontextmanager
async def batch_thread(model_dir: Path) -> AsyncIterator[Encode]:
    async with _in_thread(Tokenizer.load(model_dir).encode) as encode:
        yield encode


@contextlib.asynccontextmanager
async def processes(model_dir: Path) -> AsyncIterator[Encode]:
    async with TextEncoder(Tokenizer.load(model_dir), model_dir) as encoder:
        yield encoder.encode


CONTENDERS: dict[str, Contender] = {
    "thread": thread,
    "batch thread": batch_thread,
    "processes": processes,
}


@contextlib.asynccontextmanager
async def _in_thread(work: Callable[[str], tuple[int, ...]]) -> AsyncIterator[Encode]:
    with ThreadPoolExecutor(1) as executor:

        async def encode(text: str) -> Sequence[int]:
            return await asyncio.get_running_loop().run_in_executor(executor, work, text)

        yield encode


def prose(num_chars: int, seed: int) -> str:
    rng = Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop_", k=rng.randint(1, 9))) for _ in range(5000)]
    return " ".join(rng.choices(words, k=num_chars // 2))[:num_chars]


TEXTS: dict[str, Callable[[int, int], str]] = {
    "prose": prose,
    "one word": lambda num_chars, seed: "a" * num_chars,
    "whitespace": lambda num_chars, seed: " " * num_chars,
}


async def measure(name: str, texts: str, num_huge: int, num_chars: int) -> Measure:
    huge = [TEXTS[texts](num_chars, seed) for seed in range(num_huge)]
    longer = prose(LONGER_CHARS, 99)
    async with CONTENDERS[name](DEMO_MODEL_DIR) as encode:
        await encode(longer)  # starts what has to be started
        stalls: list[float] = []
        watching = asyncio.create_task(_watch(stalls))
        started_s = time.perf_counter()
        tasks = [asyncio.ensure_future(encode(text)) for text in huge]
        await asyncio.sleep(0.05)
        took: dict[str, list[float]] = {SHORT: [], longer: []}
        while not (took[longer] and all(task.done() for task in tasks)):
            for text, times in took.items():
                asked_s = time.perf_counter()
                await encode(text)
                times.append(time.perf_counter() - asked_s)
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
        huge_s = time.perf_counter() - started_s
        watching.cancel()
        await asyncio.wait([watching])
    return Measure(
        contender=name,
        texts=texts,
        num_huge=num_huge,
        num_chars=num_chars,
        longest_stall_s=max(stalls),
        short_median_s=statistics.median(took[SHORT]),
        short_worst_s=max(took[SHORT]),
        longer_worst_s=max(took[longer]),
        huge_s=huge_s,
    )


async def _watch(stalls: list[float]) -> None:
    """How much later than asked for the event loop comes round."""
    while True:
        started_s = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append(time.perf_counter() - started_s - 0.001)


def show(measures: Sequence[Measure]) -> None:
    sizes = f"{measures[0].num_huge} texts of {measures[0].num_chars / 1e6:g} MB"
    table = Table(title=f"Other requests while {sizes} are tokenised (ms)")
    for column in ("huge texts", "contender"):
        table.add_column(column, no_wrap=True)
    for column in ("stall", "short", "worst", "20k worst", "huge, s"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in measures:
        table.add_row(
            each.texts,
            each.contender,
            f"{each.longest_stall_s * 1e3:.1f}",
            f"{each.short_median_s * 1e3:.2f}",
            f"{each.short_worst_s * 1e3:.1f}",
            f"{each.longer_worst_s * 1e3:.0f}",
            f"{each.huge_s:.1f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-huge", type=int, default=4, help="huge texts at once")
    parser.add_argument("--num-chars", type=int, default=2_000_000, help="characters of each")
    parser.add_argument("--json", type=Path, default=Path("bench-tokenizing.json"))
    arguments = parser.parse_args()
    measures = [
        uvloop.run(measure(name, texts, arguments.num_huge, arguments.num_chars))
        for texts in TEXTS
        for name in CONTENDERS
    ]
    show(measures)
    arguments.json.write_text(json.dumps([asdict(each) for each in measures], indent=1) + "\n")


if __name__ == "__main__":
    main()
