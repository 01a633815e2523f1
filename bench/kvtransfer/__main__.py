"""`python -m bench.kvtransfer`: 16 MiB of scattered blocks by each transport, beside their peers.

    memcpy       blocks copied within one process: the limit of one core
    shm, tcp, collective   ours, from a second process, as a decode worker reads them
    nixl         ours, as a decode worker reads by it, if it is installed
    bare nixl    one READ of the library into the same blocks
    asyncio      the same blocks by the event loop's own `sock_sendall` and `sock_recv_into`
    gloo         the same blocks packed, sent in one piece by plain gloo, and unpacked
    digest       what checking the blocks costs on top

All contenders take turns in every round, so that a noisy neighbour hits them alike. Prints a table
of medians, with the medians of the ratios within a round, and writes JSON.
"""

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed
import uvloop
from rich.console import Console
from rich.table import Table

from bench.kvtransfer.bare_nixl import bare_nixl
from bench.kvtransfer.peer import layout_of, open_gloo
from kvtransfer.transports import open_transports
from pdserve.config.timers import Timers
from pdserve.domain.ids import BlockId, HandoffId, RequestId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.digest import block_digest
from pdserve.engine.kv_memory import KvMemory

MOVED_BYTES = 16 << 20
MEMORY_BYTES = 64 << 20
BLOCK_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)
HANDOFF = HandoffId(RequestId("bench"), 1, 1)
GIB = 1 << 30

Move = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    contender: str
    block_bytes: int
    median_s: float
    best_s: float
    gib_per_s: float
    ratio_to_memcpy: float  # time in a round over memcpy's, median
    speed_to_asyncio: float  # plain sockets' time in a round over its own, median
    speed_to_gloo: float  # plain gloo's, likewise
    speed_to_bare_nixl: float | None  # likewise, if there is nixl


@dataclass(frozen=True, slots=True)
class Reading:
    """Which blocks to read from the peer, and where to."""

    regions: dict[str, RemoteRegion]
    raw_port: int
    gloo_port: int
    source: KvMemory  # of this process, for the memcpy
    target: KvMemory
    remote: Sequence[BlockId]
    local: Sequence[BlockId]


def memcpy_of(reading: Reading) -> Move:
    async def move() -> None:
        for remote, local in zip(reading.remote, reading.local, strict=True):
            reading.target.block(local)[:] = reading.source.block(remote)

    return move


def digest_of(reading: Reading) -> Move:
    async def move() -> None:
        for place, local in enumerate(reading.local):
            block_digest(HANDOFF, place, reading.target.block(local))

    return move


def transport_of(name: str, reading: Reading) -> Move:
    (transport,) = open_transports([name], "127.0.0.1", timers=Timers())

    async def move() -> None:
        await transport.read(reading.regions[name], reading.remote, reading.target, reading.local)

    return move


def nixl_of(reading: Reading) -> dict[str, Move]:
    """Ours and the library itself; neither if it is not installed."""
    if (region := reading.regions.get("nixl")) is None:
        return {}
    move = transport_of("nixl", reading)
    bare: list[Move] = []

    async def move_bare() -> None:
        if not bare:  # ours has loaded the library in its own turn
            bare.append(bare_nixl(region, reading.target, reading.remote, reading.local))
        await bare[0]()

    return {"nixl": move, "bare nixl": move_bare}


async def asyncio_of(reading: Reading) -> Move:
    """One connection; the peer sends the listed blocks one `sock_sendall` each."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", reading.raw_port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = len(reading.remote).to_bytes(4, "little") + b"".join(
        block.to_bytes(4, "little") for block in reading.remote
    )

    async def move() -> None:
        await loop.sock_sendall(sock, request)
        for local in reading.local:
            block = reading.target.block(local)
            place = 0
            while place < len(block):
                place += await loop.sock_recv_into(sock, block[place:])

    return move


async def gloo_of(reading: Reading) -> Move:
    dist: Any = torch.distributed
    store = dist.TCPStore("127.0.0.1", reading.gloo_port, 2, is_master=False)
    group = await asyncio.to_thread(open_gloo, store, 1)
    ids = torch.tensor(reading.remote)
    packed = torch.empty(len(ids), reading.target.layout.block_bytes, dtype=torch.uint8)
    blocks, rows = reading.target.tensor().numpy(), packed.numpy()

    def exchange() -> None:
        group.send([ids], 0, 0).wait()
        group.recv([packed], 0, 0).wait()
        for place, local in enumerate(reading.local):
            blocks[local] = rows[place]

    async def move() -> None:
        await asyncio.to_thread(exchange)

    return move


async def time_rounds(contenders: dict[str, Move], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round to warm up."""
    name_to_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_rounds + 1):
        for name, move in contenders.items():
            start_s = time.perf_counter()
            await move()
            name_to_seconds[name].append(time.perf_counter() - start_s)
    return {name: seconds[1:] for name, seconds in name_to_seconds.items()}


async def measure(block_bytes: int, num_rounds: int) -> list[Measure]:
    num_blocks, num_moved = MEMORY_BYTES // block_bytes, MOVED_BYTES // block_bytes
    layout = layout_of(block_bytes)
    source, target = KvMemory(layout, num_blocks), KvMemory(layout, num_blocks)
    source.bytes[:] = target.bytes[:] = b"\x55" * source.num_bytes  # all pages are there
    rng = Random(block_bytes)
    with subprocess.Popen(  # noqa: ASYNC220  nothing else runs on this loop
        [
            *(sys.executable, "-m", "bench.kvtransfer.peer"),
            *map(str, (num_blocks, block_bytes, num_moved)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as peer:
        assert peer.stdout is not None
        hello = json.loads(await asyncio.to_thread(peer.stdout.readline))
        reading = Reading(
            regions={region["transport"]: RemoteRegion(**region) for region in hello["regions"]},
            raw_port=hello["raw_port"],
            gloo_port=hello["gloo_port"],
            source=source,
            target=target,
            remote=[BlockId(block) for block in rng.sample(range(num_blocks), num_moved)],
            local=[BlockId(block) for block in rng.sample(range(num_blocks), num_moved)],
        )
        contenders = {
            "memcpy": memcpy_of(reading),
            "shm": transport_of("shm", reading),
            "tcp": transport_of("tcp", reading),
            "collective": transport_of("collective", reading),
            **nixl_of(reading),
            "asyncio": await asyncio_of(reading),
            "gloo": await gloo_of(reading),
            "digest": digest_of(reading),
        }
        name_to_seconds = await time_rounds(contenders, num_rounds)
        peer.kill()

    def ratio(one: Sequence[float], other: Sequence[float]) -> float:
        return statistics.median(left / right for left, right in zip(one, other, strict=True))

    bare = name_to_seconds.get("bare nixl")
    return [
        Measure(
            contender=name,
            block_bytes=block_bytes,
            median_s=statistics.median(seconds),
            best_s=min(seconds),
            gib_per_s=MOVED_BYTES / GIB / statistics.median(seconds),
            ratio_to_memcpy=ratio(seconds, name_to_seconds["memcpy"]),
            speed_to_asyncio=ratio(name_to_seconds["asyncio"], seconds),
            speed_to_gloo=ratio(name_to_seconds["gloo"], seconds),
            speed_to_bare_nixl=ratio(bare, seconds) if bare else None,
        )
        for name, seconds in name_to_seconds.items()
    ]


def print_table(measures: Sequence[Measure]) -> None:
    names = list(dict.fromkeys(measure.contender for measure in measures))
    table = Table(title="16 MiB of scattered blocks: GiB/s (time / time of memcpy), medians")
    table.add_column("block")
    for name in names:
        table.add_column(name, justify="right")
    titles = ["tcp to asyncio", "collective to gloo", "nixl to bare"]
    for title in titles if "nixl" in names else titles[:-1]:
        table.add_column(title, justify="right")
    for block_bytes in BLOCK_SIZES:
        row = {one.contender: one for one in measures if one.block_bytes == block_bytes}
        cells = [f"{row[name].gib_per_s:.2f} ({row[name].ratio_to_memcpy:.1f})" for name in names]
        ratios = [row["tcp"].speed_to_asyncio, row["collective"].speed_to_gloo]
        if "nixl" in row and (to_bare := row["nixl"].speed_to_bare_nixl):
            ratios.append(to_bare)
        table.add_row(f"{block_bytes >> 10} KiB", *cells, *(f"{each:.2f}" for each in ratios))
    Console(width=max(120, Console().width)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bandwidth of KV transports")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, default=Path("bench-kvtransfer.json"))
    parser.add_argument("--uvloop", action="store_true", help="as the workers run")
    args = parser.parse_args()
    run = uvloop.run if args.uvloop else asyncio.run
    measures = [one for size in BLOCK_SIZES for one in run(measure(size, args.rounds))]
    print_table(measures)
    report = {
        "moved_bytes": MOVED_BYTES,
        "num_rounds": args.rounds,
        "loop": "uvloop" if args.uvloop else "asyncio",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "measures": [asdict(one) for one in measures],
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
