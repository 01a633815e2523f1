"""`python -m bench.handoff_cost`: what a handoff costs beside the computation and its bytes.

A prefill worker in a process of its own and a decode worker in this one, both as a cluster has
them, with engines that sleep and KV of a few hundred bytes a block, which is read through shared
memory. So many requests are in flight all the time; each is timed from the moment at which its
first token is sent by the prefill worker to the moment at which it joins the batch of the decode
worker: messages, digests, reads, checks and the books of both sides.

    in turn    each step of the prefill worker ends one prompt, as with long prompts
    at once    each step ends all prompts that are in flight, so that each waits for the others

Peer: bare gRPC round trips (asyncio, one unary call of 100 bytes at a time) to the same server,
before and after each round of requests.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench.handoff_cost.worker import PROMPT_TOKENS, TIMERS, parts_of
from bench.machine import Machine
from decode_worker.building import open_decode_worker
from decode_worker.decode_loop import DecodeLoop
from decode_worker.requests import DecodeRequest
from kvtransfer.transports import worker_transports
from kvtransfer.transports.base import End
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, RequestId, WorkerId
from pdserve.domain.messages import PeerHello, PrefillTarget, Role, StepOutputs, Submit
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed
from pdserve.engine.model_files import resolve_model_dir
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.logging import process_log
from pdserve.rpc.channels import open_channel
from pdserve.rpc.links import connect_prefill
from pdserve.rpc.streams import MemoryStream, iterate, memory_stream_pair

DECODE_STEP_S = 0.002
ECHO_BYTES = 100
LIMIT_S, LIMIT_RATIO = 0.0015, 2.5
"""Of the median in turn: on a quiet machine, or else beside the bare round trip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    case: str
    num_in_flight: int
    num_requests: int
    p50_s: float
    p99_s: float
    round_trip_s: float
    of_round_trip: float


class PrefillProcess:
    """The other process; ended at the end of the block."""

    def __init__(self, step_s: float, num_prompts: int) -> None:
        command = [sys.executable, "-m", "bench.handoff_cost.prefill", str(step_s)]
        self._process = subprocess.Popen(
            [*command, str(num_prompts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "PrefillProcess":
        self.address = str(self._read()["address"])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def sent_s(self) -> dict[str, float]:
        """When first tokens were sent since the last call, by request."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        sent_s: dict[str, float] = self._read()
        return sent_s

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the prefill worker ended with code {self._process.wait()}")
        return json.loads(line)


class Router:
    """Keeps so many requests in flight at the decode worker."""

    def __init__(self, stream: MemoryStream[Any, Any], target: PrefillTarget) -> None:
        self._stream = stream
        self._target = target
        self._num_sent = 0
        self._ended: dict[str, asyncio.Future[None]] = {}

    async def collect(self) -> None:
        async for message in iterate(self._stream):
            if not isinstance(message, StepOutputs):
                continue
            for output in message.outputs:
                if output.end is None:
                    continue
                if not isinstance(output.end, Completed):
                    raise SystemExit(f"a request failed: {output.end.message}")
                self._ended.pop(output.request_id).set_result(None)

    async def run(self, num_requests: int, num_in_flight: int) -> None:
        left = iter(range(num_requests))

        async def send_all() -> None:
            for _ in left:
                await self._send_one()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_in_flight):
                tasks.create_task(send_all())

    async def _send_one(self) -> None:
        self._num_sent += 1
        request_id = RequestId(f"r{self._num_sent}")
        ended = self._ended[request_id] = asyncio.get_running_loop().create_future()
        prompt = Random(self._num_sent).choices(range(2, 2000), k=PROMPT_TOKENS)
        await self._stream.send(
            Submit(
                request_id=request_id,
                attempt=1,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=2, ignore_eos=True),
                deadline_s=60.0,
                prefill_targets=(self._target,),
            )
        )
        await ended


def note_joins(loop: DecodeLoop) -> dict[str, float]:
    """When each request joined, by its name."""
    joined_s: dict[str, float] = {}
    join = loop.join

    def noted(request: DecodeRequest) -> None:
        join(request)
        joined_s[request.submit.request_id] = time.monotonic()

    loop.join = noted  # type: ignore[method-assign]
    return joined_s


async def round_trips(address: str, count: int) -> list[float]:
    """Seconds of bare calls, one after the other."""
    taken = []
    async with open_channel(address, TIMERS) as channel:
        call = channel.unary_unary("/bench.Echo/Echo", bytes, bytes)
        payload = bytes(ECHO_BYTES)
        for _ in range(count + 20):
            began_s = time.monotonic()
            await call(payload)
            taken.append(time.monotonic() - began_s)
    return taken[20:]  # the first ones connect and warm up


async def measure(case: str, arguments: argparse.Namespace) -> Row:
    in_turn = case == "in turn"
    num_prompts = 1 if in_turn else arguments.in_flight
    step_s = arguments.step_ms / 1e3 * (1 if in_turn else arguments.in_flight)
    taken: list[float] = []
    bare: list[float] = []
    with PrefillProcess(step_s, num_prompts) as prefill:
        async with AsyncExitStack() as stack:
            parts = parts_of(Role.DECODE, step_s=DECODE_STEP_S, num_prompts=1)
            stack.callback(parts.engine.close)
            worker = await stack.enter_async_context(
                open_decode_worker(
                    parts,
                    worker_transports(parts.settings, End(parts.epoch)),
                    tokenizer=Tokenizer.load(resolve_model_dir("demo")),
                    connect=connect_prefill,
                )
            )
            joined_s = note_joins(worker.loop)
            stream, served = memory_stream_pair("router", "decode")
            await stream.send(
                PeerHello(peer_id="router", epoch=Epoch(1), protocol_version=PROTOCOL_VERSION)
            )
            target = PrefillTarget(
                worker_id=WorkerId("prefill"), address=prefill.address, epoch=Epoch(1)
            )
            router = Router(stream, target)
            serving = asyncio.create_task(worker.service.handle(served))
            collecting = asyncio.create_task(router.collect())
            for number in range(arguments.rounds + 1):
                bare += await round_trips(prefill.address, 100)
                await router.run(arguments.requests, arguments.in_flight)
                bare += await round_trips(prefill.address, 100)
                sent_s = prefill.sent_s()
                if number:
                    taken += [joined_s[name] - at_s for name, at_s in sent_s.items()]
            stream.abort()
            await asyncio.wait([serving, collecting])
            collecting.result()
    p50_s, round_trip_s = statistics.median(taken), statistics.median(bare)
    return Row(
        case=case,
        num_in_flight=arguments.in_flight,
        num_requests=len(taken),
        p50_s=p50_s,
        p99_s=sorted(taken)[len(taken) * 99 // 100],
        round_trip_s=round_trip_s,
        of_round_trip=p50_s / round_trip_s,
    )


def show(rows: Sequence[Row]) -> None:
    table = Table(title="First token sent to joined, milliseconds")
    table.add_column("prompts end")
    for name in ("in flight", "requests", "p50", "p99", "gRPC round trip p50", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.case,
            str(row.num_in_flight),
            str(row.num_requests),
            f"{1e3 * row.p50_s:.2f}",
            f"{1e3 * row.p99_s:.2f}",
            f"{1e3 * row.round_trip_s:.2f}",
            f"{row.of_round_trip:.2f} x",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-flight", type=int, default=20, help="requests at any time [20]")
    parser.add_argument("--requests", type=int, default=200, help="of each round [200]")
    parser.add_argument("--rounds", type=int, default=3, help="that count [3]")
    parser.add_argument("--step-ms", type=float, default=5.0, help="of prefill for a prompt [5]")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    machine = Machine.here({})
    print(machine.text)
    with process_log(level="warning", file=None):
        rows = [uvloop.run(measure(case, arguments)) for case in ("in turn", "at once")]
    show(rows)
    first = rows[0]
    is_met = first.p50_s <= LIMIT_S or first.of_round_trip <= LIMIT_RATIO
    print(
        f"in turn: {1e3 * first.p50_s:.2f} ms, {first.of_round_trip:.2f} x a round trip; the limit "
        f"is {1e3 * LIMIT_S:g} ms or {LIMIT_RATIO:g} x: {'met' if is_met else 'not met'}"
    )
    if arguments.json is not None:
        report = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
