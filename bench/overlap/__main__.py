"""`python -m bench.overlap`: the visible time of KV transfers, with and without overlap.

    none      peer: blocks travel once the whole prompt is computed
    chunks    blocks travel as soon as the chunk that fills them is computed
    layers    as chunks, and of the last chunk the layers that are computed

Each is a cluster of 1 + 1 workers, and they take turns: each prompt goes to all of them, and all
must give the same tokens. The visible time is from the first token to the last block checked at the
decode worker, as the phase timeline of the answer has it (`handoff_wait_s`). Prints medians and
what share of `none` they are; writes JSON.

The model is that of `bench.engine` with as many KV heads as query heads, so that a chunk of 512
tokens has 16 MiB of KV: what there is to hide is then more than messages.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from bench.engine.model import VOCAB_SIZE, write_model
from bench.machine import Machine
from deploy.deployment import deployment_of_cluster
from deploy.local import LocalCluster
from deploy.profiling import profiled_settings
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.domain.overlap import Overlap

WITHOUT: Overlap = "none"
MODES: tuple[Overlap, ...] = (WITHOUT, "chunks", "layers")
BLOCK_SIZE = 16
LIMIT = 0.15
"""What is left of the visible time with overlap, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt length over one transport, with one kind of overlap."""

    transport: str
    num_chunks: int
    num_tokens: int
    overlap: Overlap
    num_requests: int
    kv_bytes: int
    prefill_s: float
    transfer_s: float
    visible_s: float
    visible_of_without: float


class Contender:
    """A cluster of 1 + 1 workers."""

    def __init__(self, cluster: LocalCluster, client: InferenceClient) -> None:
        self._cluster = cluster
        self._client = client

    async def run(self, prompt: Sequence[int]) -> tuple[Mapping[str, float], tuple[int, ...]]:
        """The phase timeline of one answer, and its tokens."""
        answer = await self._client.complete(
            tuple(prompt),
            Sampling(temperature=0.0, max_tokens=4, ignore_eos=True),
            timeout_s=300.0,
        )
        timeline = asdict(answer.finished.timeline)
        figures = {name: value for name, value in timeline.items() if not isinstance(value, str)}
        return figures, tuple(token.token_id for token in answer.tokens)


async def measure(arguments: argparse.Namespace, model: Path) -> list[Row]:
    """All transports, one after the other."""
    rows: list[Row] = []
    for transport in arguments.transports:
        async with contextlib.AsyncExitStack() as stack:
            contenders = {
                mode: await _start(stack, arguments, model, transport, mode) for mode in MODES
            }
            for num_chunks in arguments.chunks:
                rows += await _compare(arguments, contenders, transport, num_chunks)
    return rows


async def _start(
    stack: contextlib.AsyncExitStack,
    arguments: argparse.Namespace,
    model: Path,
    transport: str,
    mode: Overlap,
) -> Contender:
    num_tokens = max(arguments.chunks) * arguments.chunk_tokens + BLOCK_SIZE
    flags = {
        "model": str(model),
        "transports": [transport],
        "block_size": BLOCK_SIZE,
        "num_blocks": num_tokens // BLOCK_SIZE + 8,
        "prefix_reuse": False,
        "prefill.max_step_tokens": arguments.chunk_tokens,
        "prefill.overlap": mode,
    }
    deployment = deployment_of_cluster(profiled_settings(flags, []))
    cluster = await stack.enter_async_context(LocalCluster.start(deployment))
    client = await stack.enter_async_context(InferenceClient(cluster.public_address))
    return Contender(cluster, client)


async def _compare(
    arguments: argparse.Namespace,
    contenders: Mapping[Overlap, Contender],
    transport: str,
    num_chunks: int,
) -> list[Row]:
    num_tokens = num_chunks * arguments.chunk_tokens
    taken: dict[Overlap, list[Mapping[str, float]]] = {mode: [] for mode in contenders}
    for number in range(arguments.rounds + 1):
        seed = f"{transport} {num_chunks} {number}"
        prompt = Random(seed).choices(range(2, VOCAB_SIZE), k=num_tokens)
        answers = set()
        for mode, contender in contenders.items():
            timeline, tokens = await contender.run(prompt)
            answers.add(tokens)
            if number:  # the first warms up
                taken[mode].append(timeline)
        if len(answers) > 1:
            raise SystemExit(f"answers differ by overlap: {answers}")
    without_s = _median(taken[WITHOUT], "handoff_wait_s")
    return [
        Row(
            transport=transport,
            num_chunks=num_chunks,
            num_tokens=num_tokens,
            overlap=mode,
            num_requests=len(timelines),
            kv_bytes=int(_median(timelines, "transferred_bytes")),
            prefill_s=_median(timelines, "prefill_s"),
            transfer_s=_median(timelines, "transfer_s"),
            visible_s=_median(timelines, "handoff_wait_s"),
            visible_of_without=_median(timelines, "handoff_wait_s") / without_s,
        )
        for mode, timelines in taken.items()
    ]


def _median(timelines: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(timeline[name] for timeline in timelines)


def show(rows: Sequence[Row]) -> None:
    table = Table(title="KV transfers, medians")
    table.add_column("transport")
    table.add_column("overlap")
    for name in ("chunks", "tokens", "KV MiB", "prefill s", "transfer ms", "visible ms", "of none"):
        table.add_column(name, justify="right")
    for row in rows:
        is_peer = row.overlap == WITHOUT
        table.add_row(
            row.transport,
            row.overlap,
            str(row.num_chunks),
            str(row.num_tokens),
            f"{row.kv_bytes / 2**20:.0f}",
            f"{row.prefill_s:.2f}",
            f"{1e3 * row.transfer_s:.1f}",
            f"{1e3 * row.visible_s:.2f}",
            "" if is_peer else f"{row.visible_of_without:.3f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="requests of each kind [5]")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 16], help="of a prompt")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="of a chunk [512]")
    parser.add_argument("--kv-heads", type=int, default=8, choices=[1, 2, 4, 8], help="[8]")
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    machine = Machine.here({})
    print(machine.text)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        num_tokens = max(arguments.chunks) * arguments.chunk_tokens + BLOCK_SIZE
        write_model(model, num_kv_heads=arguments.kv_heads, max_context_tokens=num_tokens)
        rows = asyncio.run(measure(arguments, model))
    show(rows)
    worst = max(row.visible_of_without for row in rows if row.overlap == MODES[-1])
    print(f"{MODES[-1]}: {worst:.3f} of the time without at most; the limit is {LIMIT:g}")
    if arguments.json is not None:
        report = {
            "machine": asdict(machine),
            "load": os.getloadavg()[0],
            "limit": LIMIT,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
