"""`python -m bench.attention`: decode attention by dtype, compiled and gathered, on one core.

    compiled    numba reads K and V where they lie
    gathered    K and V are gathered for each request and attended by torch

One layer of 8 query heads and 2 KV heads of 64, blocks of 16 that lie scattered; 8 layers follow
each other, so that caches are as cold as in a model. Storing the new K and V is included. All
contenders take turns in every round; microseconds of the processor for one layer, medians.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from bench.machine import Machine
from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.attention import AttentionCall
from pdserve.engine.contract import SequenceStep, StepBatch
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.numba_attention import compile_attention
from pdserve.engine.packing import pack
from pdserve.engine.paged_cache import DTYPES, PagedCache, PagedStep

NUM_LAYERS, HEADS, LAYER = 8, 8, LayerKv(2, 64, 64)
BLOCK_SIZE = 16
SHAPES = ((64, 56), (8, 512), (64, 512), (16, 2048))  # requests, and positions that each sees
SAMPLE_S = 0.02


def contender(dtype: str, is_compiled: bool, num_requests: int, context: int) -> Callable[[], None]:
    """One step's attention, of all layers."""
    layout = KvLayout(
        layers=(LAYER,) * NUM_LAYERS,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        item_bytes=DTYPES[dtype].itemsize,
    )
    table_size = layout.num_blocks_for(context)
    kv = KvMemory(layout, num_requests * table_size)
    kv.tensor().view(DTYPES[dtype]).normal_()
    cache = PagedCache(kv, compile_attention(dtype) if is_compiled else None)
    blocks = [BlockId(block) for block in range(kv.num_blocks)]
    random.Random(1).shuffle(blocks)
    steps = [
        SequenceStep(
            token_ids=(1,),
            start=context - 1,
            block_table=tuple(blocks[place * table_size : (place + 1) * table_size]),
        )
        for place in range(num_requests)
    ]
    packed = pack(StepBatch(tuple(steps)), BLOCK_SIZE)
    query = torch.randn(HEADS, num_requests, LAYER.k_head_dim).to(DTYPES[dtype])
    key = torch.randn(LAYER.num_kv_heads, num_requests, LAYER.k_head_dim).to(DTYPES[dtype])

    def run() -> None:
        step = PagedStep(cache, packed)
        for layer in range(NUM_LAYERS):
            step.attend(AttentionCall(layer=layer, query=query, key=key, value=key, scaling=0.125))

    return run


def sample_us(run: Callable[[], None]) -> float:
    run()  # what the contender before it left in the caches is not its own
    began_s, num_runs = time.thread_time(), 0
    while (spent_s := time.thread_time() - began_s) < SAMPLE_S:
        run()
        num_runs += 1
    return spent_s / num_runs / NUM_LAYERS * 1e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.attention")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table(title=f"one layer's decode attention, us, on one core of {Machine.here({}).text}")
    for column in ("requests", "positions", "dtype", "compiled", "gathered", "ratio"):
        table.add_column(column, justify="right")
    for num_requests, context in SHAPES:
        runs = {
            (dtype, is_compiled): contender(dtype, is_compiled, num_requests, context)
            for dtype in DTYPES
            for is_compiled in (True, False)
        }
        samples: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                samples[key].append(sample_us(run))
        medians = {key: statistics.median(taken) for key, taken in samples.items()}
        for dtype in DTYPES:
            compiled, gathered = medians[dtype, True], medians[dtype, False]
            cells = (f"{compiled:.0f}", f"{gathered:.0f}", f"{gathered / compiled:.1f} x")
            table.add_row(str(num_requests), str(context), dtype, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
